"""What an exit code says to people and launchers, and the failures that are told in one line. Imports no jax."""

DONE = 0
UNEXPECTED = 1
USAGE = 2
NO = 3
DATA = 65
NON_FINITE = 70
CHECKPOINT = 74
AGAIN = 75
STALLED = 76
INTERRUPTED = 130

MEANINGS = {
    DONE: "done",
    UNEXPECTED: "unexpected: a traceback was printed",
    USAGE: "the command line or the config is wrong",
    NO: "the answer is no: the plan does not fit, the run cannot start as asked",
    DATA: "the data cannot be used",
    NON_FINITE: "the loss is not finite, given up",
    CHECKPOINT: "a checkpoint or the disk failed",
    AGAIN: "saved on request: run the same command again",
    STALLED: "no progress: restart",
    INTERRUPTED: "interrupted by Ctrl-C",
}


class Failure(Exception):
    """A foreseen failure, printed as it is and without a traceback; each subclass names its exit code."""

    exit_code: int = UNEXPECTED
