"""What an exit code says to people and launchers, and the failures that are told in one line. Imports no jax."""

DONE = 0  # the work is finished
UNEXPECTED = 1  # a defect; a traceback was printed
USAGE = 2  # the command line or the config is wrong
NO = 3  # the answer is no: the plan does not fit, the run cannot start as asked
DATA = 65  # the data cannot be used
NON_FINITE = 70  # the loss is not finite, and the run gave up
CHECKPOINT = 74  # a checkpoint or the disk failed
AGAIN = 75  # saved on request: run the same command again
STALLED = 76  # no progress: restart
INTERRUPTED = 130  # Ctrl-C


class Failure(Exception):
    """A foreseen failure, printed as it is and without a traceback; each subclass names its exit code."""

    exit_code: int = UNEXPECTED
