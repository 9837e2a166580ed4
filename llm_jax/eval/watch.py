"""`llm-jax eval --watch`: every checkpoint that stays is evaluated once, in the order of their steps, as they come.

eval.jsonl alone says what is done; all else is found out anew, so a watcher may be killed at any moment. Process 0
decides what comes next, and all hear it.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llm_jax.checkpoint import CheckpointError
from llm_jax.eval import agenda
from llm_jax.eval.agenda import Agenda, Turn
from llm_jax.eval.evaluation import Evaluate, append, make_evaluation, now, opened
from llm_jax.eval.history import EVALUATIONS
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.restore import Missing, restore_weights
from llm_jax.eval.task_files import Read, read_tasks
from llm_jax.guards import Stop
from llm_jax.processes import settle
from llm_jax.run_directory import sole_watcher


class Programs(NamedTuple):
    """What evaluates checkpoints, and what it was made for: the run as it is evaluated, its data, its tokenizer."""

    made_for: tuple[Any, ...]
    evaluate: Evaluate


def watch(
    run_dir: str, overrides: Sequence[str], *, split: str, as_json: bool, tasks: Sequence[str], stop: Stop
) -> None:
    """Evaluates every regular and permanent checkpoint of a run once, until the one after its last update.

    Adds a line to eval.jsonl for each, and keeps best.json. stop is asked before each batch and between two looks, and
    must answer alike on all processes. Needs the job's processes joined.
    Raises Refused where another watcher is at work, NotFinite where the last checkpoint's weights are broken, and what
    evaluate_checkpoint raises.
    """
    reads = read_tasks(tasks)
    known = Agenda(Path(run_dir), split, frozenset(read.name for read in reads))

    def stopped() -> bool:
        """A checkpoint that comes and goes while another one is evaluated has been seen."""
        if jax.process_index() == 0:
            agenda.look(known)
        return stop()

    while not settle("watched directory", "", lambda _: agenda.is_there(known)):
        if not waited(stop):
            return
    with sole_watcher(run_dir):
        programs: Programs | None = None
        while (turn := next_turn(known)).what != "end":
            if turn.what == "wait":
                if not waited(stop):
                    return
                continue
            try:
                programs, row = evaluated(run_dir, turn.step, overrides, split, reads, programs, stopped)
            except (CheckpointError, Missing) as error:
                on_first("watch passed over", lambda problem=str(error): agenda.pass_over(known, turn.step, problem))
                continue
            except NotFinite as error:
                if turn.is_last:
                    raise
                on_first("watch passed over", lambda problem=str(error): agenda.pass_over(known, turn.step, problem))
                continue
            if row is None:
                return
            row |= {"time": now(), "rolled_back": turn.rolled_back}
            on_first("watch evaluated", lambda row=row: noted(known, row, as_json))


def next_turn(known: Agenda) -> Turn:
    """What to do next, as process 0 sees it."""
    return Turn(*json.loads(settle("watch turn", "", lambda _: json.dumps(agenda.decide(known)))))


def waited(stop: Stop) -> bool:
    """Lets a little time pass; whether to go on."""
    if jax.process_index() == 0:
        time.sleep(agenda.LOOK_S)
    return not stop()


def on_first(topic: str, act: Callable[[], None]) -> None:
    """Process 0 acts; what it raises, all raise."""
    settle(topic, "", lambda _: act() or "")


def evaluated(
    run_dir: str,
    step: int,
    overrides: Sequence[str],
    split: str,
    reads: Sequence[Read],
    programs: Programs | None,
    stop: Stop,
) -> tuple[Programs, dict[str, Any] | None]:
    """A checkpoint's figures and sample, None where it was stopped; and the programs, made anew where it needs others.

    The weights are gone when this returns. Raises CheckpointError and Missing where they could not be read.
    """
    with opened(run_dir, step, overrides) as (found, run, mesh):
        made_for = (run, mesh, found.data_fingerprint, found.tokenizer.fingerprint)
        if programs is None or programs.made_for != made_for:
            programs = Programs(made_for, make_evaluation(found, run, mesh, split, reads, stop))
        scored = programs.evaluate(restore_weights(found, run.model, mesh))
    return programs, None if scored is None else {"step": step, **scored[0], "sample": scored[1]}


def noted(known: Agenda, row: dict[str, Any], as_json: bool) -> None:
    """The line in eval.jsonl, first; then what follows from it, and what people or programs hear of it."""
    append(known.run_dir / EVALUATIONS, row)
    agenda.keep_best(known)
    told = {name: value for name, value in row.items() if name not in ("sample", "time", "rolled_back")}
    print(json.dumps(told) if as_json else agenda.in_words(known, row), flush=True)
