"""`llm-jax train`: trains what a config describes, or goes on with it where it stopped."""

from collections.abc import Sequence

from llm_jax import command_line
from llm_jax.early_signals import leaving_at_once
from llm_jax.run import from_command_line

_DESCRIPTION = """\
Train what a config describes, preparing its data first if need be. On a run directory with checkpoints it goes on from
the newest; on a finished one it says so. Ctrl-C and SIGTERM save first and exit with 130 and 75: run it again."""

_EXAMPLES = """\
  llm-jax train configs/quickstart.py
  llm-jax train configs/quickstart.py run_dir=runs/wide model.d_model=384 model.d_ff=1024
  llm-jax train configs/quickstart.py mesh.fsdp=4 mesh.tensor=2      on eight devices: the same losses"""


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code. Raises Failure for what is foreseen."""
    with leaving_at_once():
        return _train(argv)


def _train(argv: Sequence[str]) -> int:
    parser = command_line.Parser("train", _DESCRIPTION, _EXAMPLES)
    command_line.add_run_arguments(parser)
    parser.add_argument(
        "--allow-drift",
        action="store_true",
        help="go on although the config differs from the one the run was begun with; weights must keep their shapes",
    )
    arguments = parser.read(argv)
    run = from_command_line(arguments.config, arguments.overrides)
    # What takes seconds to import comes after the config was found good.
    from llm_jax.distributed import join_processes
    from llm_jax.mesh import keep_compiled
    from llm_jax.train.attempt import attempt

    keep_compiled()
    join_processes(run.watchdog.heartbeat_s, run.watchdog.join_s)
    return attempt(run, allow_drift=arguments.allow_drift)
