"""`llm-jax train`: puts a run together, and goes through it; on a run directory that exists it goes on."""

from collections.abc import Sequence

from llm_jax import exit_codes
from llm_jax.run import from_command_line

USAGE = """\
usage: llm-jax train CONFIG [path=value ...] [--allow-drift]

Trains what the config describes, preparing its data first if need be. On a run directory with checkpoints it goes on
from the newest; on a finished one it says so. Ctrl-C and SIGTERM save first (exit codes 130 and 75: run it again).

  --allow-drift   go on although the config differs from the one that the run was begun with (shapes may never)

examples:
  llm-jax train configs/quickstart.py
  llm-jax train configs/quickstart.py run_dir=runs/wide model.d_model=512 model.d_ff=1376
  llm-jax train configs/quickstart.py mesh.fsdp=4 mesh.tensor=2     on eight devices: the same losses
"""


def main(argv: Sequence[str]) -> int:
    """The verb. Raises Failure for what is foreseen."""
    if "-h" in argv or "--help" in argv or not argv:
        print(USAGE, end="")
        return exit_codes.DONE if argv else exit_codes.USAGE
    arguments = [a for a in argv if a != "--allow-drift"]
    run = from_command_line(arguments[0], arguments[1:])
    # What takes seconds to import comes after the config was found good.
    from llm_jax.mesh import join_processes, keep_compiled
    from llm_jax.train.attempt import attempt

    keep_compiled()
    join_processes()
    return attempt(run, allow_drift="--allow-drift" in argv)
