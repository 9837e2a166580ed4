"""What a process's exit code means, to people and to launchers; and the failures that are told in one line. No jax."""

DONE = 0
"""The work is finished."""
UNEXPECTED = 1
"""A defect: a traceback was printed."""
USAGE = 2
"""The command line or the config is wrong."""
NO = 3
"""The answer is no: the plan does not fit, the run cannot start as asked."""
DATA = 65
"""The data cannot be used."""
NON_FINITE = 70
"""The loss is not finite, and the run gave up."""
CHECKPOINT = 74
"""A checkpoint or the disk failed."""
AGAIN = 75
"""Saved on request: run the same command again."""
STALLED = 76
"""No progress: restart."""
INTERRUPTED = 130
"""Ctrl-C."""


class Failure(Exception):
    """A foreseen failure, told in one line without a traceback; each subclass names its exit code."""

    exit_code: int = UNEXPECTED
