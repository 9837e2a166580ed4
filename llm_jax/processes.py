"""What several processes settle among themselves, without a device: any thread may ask, and no step is in the way."""

import collections
import time
from collections.abc import Callable

import jax
from jax._src import distributed  # the coordination service has no public door, and device collectives know no threads

from llm_jax.exit_codes import Failure

# A peer that died ends everyone's wait much earlier (the coordination service aborts the job); this bounds a hung disk.
TIMEOUT_S = 1800.0

# A refusal usually comes to every process, to some of them later. Process 0 hosts the coordination service, whose end
# aborts every process that is still there: it gives the others this long to leave by themselves, and this long between
# a process's notice and its end.
LEAVE_TIMEOUT_S = 10.0
LEAVE_GRACE_S = 1.0
_LEAVING = "llm_jax/leaving/"

_rounds: collections.Counter[str] = collections.Counter()


def leave_in_order(timeout_s: float = LEAVE_TIMEOUT_S) -> None:
    """Gives notice that this process ends; on process 0, waits first until every other process has given its own.

    The caller ends the process right afterwards. Process 0 waits for timeout_s at most: a process that waits for it in
    a collective gives no notice. Uses no device, and does not raise where the service is gone.
    """
    state = distributed.global_state
    # It comes right after the connection; before that, the service ends a process that asks it anything.
    if state.client is None or state.preemption_sync_manager is None:
        return
    try:
        if state.process_id > 0:
            state.client.key_value_set(f"{_LEAVING}{state.process_id}", "leaving")
            return
        deadline = time.monotonic() + timeout_s
        while len(state.client.key_value_dir_get(_LEAVING)) < state.num_processes - 1:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
    except jax.errors.JaxRuntimeError:
        return
    time.sleep(LEAVE_GRACE_S)


def settle(topic: str, mine: str, judge: Callable[[list[str]], str], *, timeout_s: float = TIMEOUT_S) -> str:
    """Process 0 hears what every process has to say on a topic and decides; everyone gets its answer.

    Every process asks about a topic equally often, and in one thread at a time. judge runs on process 0 alone, on what
    was said in order of process. What it raises is raised everywhere: on process 0 as it is, elsewhere a Failure as a
    Failure of the same text and exit code, and anything else as a RuntimeError.
    """
    if jax.process_count() == 1:
        return judge([mine])
    client = distributed.global_state.client
    assert client is not None, "several processes without jax.distributed.initialize()"
    _rounds[topic] += 1
    key, patience_ms = f"llm_jax/{topic}/{_rounds[topic]}", int(timeout_s * 1000)
    if jax.process_index() > 0:
        client.key_value_set(f"{key}/{jax.process_index()}", mine)
        outcome, answer = client.blocking_key_value_get(f"{key}/answer", patience_ms).split("\n", 1)
        if outcome == "settled":
            return answer
        if outcome == "defect":
            raise RuntimeError(f"on process 0: {answer}")
        failure = Failure(answer)
        failure.exit_code = int(outcome)
        raise failure
    said = [client.blocking_key_value_get(f"{key}/{process}", patience_ms) for process in range(1, jax.process_count())]
    # Whoever speaks in this round has read the answer of the last one, so that is no longer needed.
    client.key_value_delete(f"llm_jax/{topic}/{_rounds[topic] - 1}/")
    try:
        answer = judge([mine, *said])
    except BaseException as error:
        outcome = getattr(error, "exit_code", "defect")
        client.key_value_set(f"{key}/answer", f"{outcome}\n{error}")
        raise
    client.key_value_set(f"{key}/answer", f"settled\n{answer}")
    return answer
