"""The verbs: `llm-jax VERB ...`. Each is imported when it is called, so that what needs no jax does not wait for it."""

import contextlib
import difflib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from llm_jax.config import ConfigError
from llm_jax.exit_codes import DONE, INTERRUPTED, MEANINGS, UNEXPECTED, USAGE, Failure

# A process that goes only because another went leaves this much later: Kubernetes believes the first end that it sees,
# and it looks about once a second. A memory limit's SIGKILL is to be retried, an exit code of 1 is not.
ECHO_S = 5.0

VERBS = {
    "config": "show a run: every field, its value, what it accepts, and its help",
    "data": "prepare: make a run's text, tokenizer and rows; show: print rows of a batch as text",
    "train": "train what a config describes, or go on with it where it stopped",
    "eval": "score a checkpoint on held-out text",
    "generate": "continue prompts with text from a checkpoint",
    "inspect": "show what a checkpoint makes of a text: losses, attention, logit lens, experts",
    "fill-mask": "fill the [MASK]s of a text by a masked language model",
    "plan": "does it fit, what does it communicate, how fast could it be: for hardware that is not here",
    "launch": "train on many machines: Slurm, Kubernetes, or a rehearsal on this one",
    "report": "one HTML page from run directories: curves, figures, configs",
}

HELP = f"""\
usage: llm-jax VERB ...        (python -m llm_jax is the same)

Pre-train language models. A run is a config file, and path=value changes it.

verbs:
{chr(10).join(f"  {verb:<10} {what}" for verb, what in VERBS.items())}

examples:
  llm-jax config configs/quickstart.py
  llm-jax train configs/quickstart.py model.n_layers=6 optim.lr=2e-3 run_dir=runs/deeper
  llm-jax eval runs/deeper
  llm-jax report runs/quickstart runs/deeper

llm-jax VERB --help shows a verb's arguments.

exit codes:
{chr(10).join(f"  {code:<10} {meaning}" for code, meaning in MEANINGS.items())}
"""


def run_verb(argv: Sequence[str]) -> int:
    """The exit code of the verb that argv begins with. Raises ConfigError for an unknown one."""
    verb, *rest = argv
    match verb:
        case "config":
            from llm_jax import show_config

            return show_config.main(rest)
        case "data":
            from llm_jax.data import cli as data

            return data.main(rest)
        case "train":
            from llm_jax.train import cli as train

            return train.main(rest)
        case "eval":
            from llm_jax.eval import cli as evaluation

            return evaluation.evaluate(rest)
        case "generate":
            from llm_jax.eval import cli as evaluation

            return evaluation.generate(rest)
        case "inspect":
            from llm_jax.inspection import cli as inspection

            return inspection.main(rest)
        case "fill-mask":
            from llm_jax.eval import cli as evaluation

            return evaluation.fill_mask(rest)
        case "plan":
            from llm_jax.plan import cli as plan

            return plan.main(rest)
        case "launch":
            from llm_jax.launch import cli as launch

            return launch.main(rest)
        case "report":
            from llm_jax.report import cli as report

            return report.main(rest)
    close = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(VERBS)}"
    raise ConfigError(f"llm-jax {verb}: no such verb; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code; failures are told on stderr, in a line where they were foreseen."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return DONE
    if not argv:
        print(HELP, end="", file=sys.stderr)
        return USAGE
    try:
        return _together(run_verb(argv))
    except Failure as failure:
        print(failure, file=sys.stderr)
        return _leave(failure.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _leave(INTERRUPTED)
    except Exception as error:  # noqa: BLE001  the last one to hear of it
        traceback.print_exc()
        return _leave(UNEXPECTED, after_s=ECHO_S if _may_be_an_echo(error) else 0)


def _together(exit_code: int) -> int:
    """The exit code; several processes end together, since the first to go would take its peers with it.

    A SIGTERM changes it no more: a launcher sends one when it sees the first process gone, and Python gives the signal
    its default back long before the last library has let go.
    """
    jax = sys.modules.get("jax")  # what has not been imported is not running
    if jax is not None and jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        jax.distributed.shutdown()
    return exit_code


def _may_be_an_echo(error: Exception) -> bool:
    """Whether an error of JAX may come of another process's end: a collective that it had a part in breaks."""
    jax = sys.modules.get("jax")  # what has not been imported is not running
    return jax is not None and jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)


def _leave(exit_code: int, after_s: float = 0.0) -> int:
    """Returns the exit code; one of several processes ends here instead, since its peers would wait minutes for it.

    It ends after_s later, and process 0 gives the others a few seconds to end with a code and a line of their own.
    """
    jax = sys.modules.get("jax")  # what has not been imported is not running
    if jax is not None and jax.distributed.is_initialized():
        from llm_jax import processes

        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(after_s)
            processes.leave_in_order(processes.LEAVE_TIMEOUT_S - after_s)
        os._exit(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
