"""What several processes settle among themselves, without a device: any thread may ask, and no step is in the way."""

import collections
from collections.abc import Callable

import jax
from jax._src import distributed  # the coordination service has no public door, and device collectives know no threads

from llm_jax.exit_codes import Failure

# A peer that died ends everyone's wait much earlier (the coordination service aborts the job); this bounds a hung disk.
TIMEOUT_S = 1800.0

_rounds: collections.Counter[str] = collections.Counter()


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
