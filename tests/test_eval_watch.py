"""`llm-jax eval --watch`: every checkpoint once, in order, whoever is killed; and what eval.jsonl says is so."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from llm_jax.checkpoint import Checkpoints
from llm_jax.config import ConfigError
from llm_jax.data.prepare import prepare
from llm_jax.eval import agenda, evaluation, history
from llm_jax.eval import cli as cli_module
from llm_jax.eval.agenda import Agenda, Turn
from llm_jax.eval.evaluation import evaluate_checkpoint
from llm_jax.eval.watch import watch
from llm_jax.guards import Stop, never
from llm_jax.manifest import Kind
from llm_jax.model.paths import to_tree
from llm_jax.optim.config import AdamWConfig
from llm_jax.report.record import read
from llm_jax.run import Run
from llm_jax.run_directory import Refused, sole_watcher
from llm_jax.train.config import TrainConfig
from llm_jax.train.start import checkpoint_meta
from llm_jax.train.state import init_state
from tests.conftest import Start, free_port
from tests.small import mesh_of
from tests.test_eval_verbs import MODEL, SHORT, text_source, write_texts
from tests.training import train, wait_for

# On one device: the quickest, and meshes are others' business.
ALONE = ["mesh.data=1"]
LAST = 40


class Saver(NamedTuple):
    """Saves checkpoints as a training run would."""

    meta: dict[str, Any]

    def save(self, run_dir: Path, step: int, *, seed: int | None = None, kind: Kind = "regular") -> None:
        checkpoints = Checkpoints(run_dir / "checkpoints", keep=99)
        with jax.set_mesh(mesh_of()):
            state = jax.jit(to_tree)(_state(step if seed is None else seed))
            checkpoints.save(step, state, self.meta, kind=kind, wait=True)
        checkpoints.close()


@jax.jit
def _state(seed: int) -> Any:
    return init_state(MODEL, AdamWConfig(), seed)


@pytest.fixture(scope="module", autouse=True)
def short_sample() -> Iterator[None]:
    """A sample of an evaluation is as short as in tests/test_eval_verbs.py, and so are its programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SAMPLING", SHORT)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saver]:
    """A run of 40 updates with checkpoints 10, 20 and 40."""
    root = tmp_path_factory.mktemp("watched")
    write_texts(root / "texts")
    run = Run(
        name="watched", run_dir=str(root / "run"), model=MODEL, data=text_source(root), train=TrainConfig(steps=LAST)
    )
    prepared = prepare(run.data, run.tokenizer, MODEL.vocab_size, run.seed, report=lambda line: None)
    saver = Saver(checkpoint_meta(run, prepared, {}))
    for step in (10, 20, LAST):
        saver.save(root / "run", step)
    (root / "run" / "tokenizer.model").write_bytes(prepared.tokenizer.model)
    return root / "run", saver


@pytest.fixture
def run_dir(made: tuple[Path, Saver], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def watched(run_dir: Path, *, stop: Stop = never, as_json: bool = True) -> None:
    watch(str(run_dir), ALONE, split="validation", as_json=as_json, tasks=(), stop=stop)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("time", "rolled_back")}


def known_of(run_dir: Path) -> Agenda:
    return Agenda(run_dir, "validation", frozenset())


def test_every_checkpoint_that_stays_once_in_order_as_plain_eval_scores_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(run_dir)
    out, err = capsys.readouterr()
    ours = rows(run_dir)
    assert [row["step"] for row in ours] == [10, 20, LAST]
    assert [json.loads(line)["step"] for line in out.splitlines()] == [10, 20, LAST]
    for row, line in zip(ours, out.splitlines(), strict=True):
        assert json.loads(line) == {name: row[name] for name in row if name not in ("time", "rolled_back", "sample")}
    best = min(ours, key=lambda row: row["bits_per_byte"])
    expected = {"step": best["step"], "split": "validation", "metric": "bits_per_byte", "value": best["bits_per_byte"]}
    assert json.loads((run_dir / "best.json").read_text()) == expected
    assert f"the best is {best['step']}" in err and "missed" not in err
    # A second life finds nothing to do; and a plain evaluation says the same of each.
    watched(run_dir)
    assert rows(run_dir) == ours and capsys.readouterr().out == ""
    for row in ours:
        evaluate_checkpoint(str(run_dir), row["step"], ALONE, split="validation", as_json=True)
        assert figures(rows(run_dir)[-1]) == figures(row)


def test_a_run_s_checkpoints_are_evaluated_by_programs_compiled_once_and_no_old_weights_stay(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is compiled, and how much is on the devices, when each checkpoint's evaluation begins and after the last."""
    seen: dict[int, tuple[int, int]] = {}

    def stop() -> bool:
        done = len(rows(run_dir)) if (run_dir / "eval.jsonl").exists() else 0
        compiled = sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)
        seen.setdefault(done, (compiled, sum(array.nbytes for array in jax.live_arrays())))
        return False

    with jax.log_compiles(), caplog.at_level("WARNING"):
        watched(run_dir, stop=stop)
        compiled = sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)
    assert seen[1][0] > seen[0][0] and seen[2][0] == seen[1][0] == compiled
    assert seen[0][1] == seen[1][1] == seen[2][1]


@pytest.mark.parametrize(
    ("cut", "again"),
    [
        pytest.param(40, [10, 20, LAST], id="a half-written line is written again"),
        pytest.param(1, [10, LAST], id="a line that lacks only its end is whole"),
    ],
)
def test_killed_in_mid_append(run_dir: Path, cut: int, again: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    row = {"step": 20, "split": "validation", "stride": 16, "bits_per_byte": 0.5, "loss": 1.0, "tasks": {}}
    (run_dir / "eval.jsonl").write_text((json.dumps(row) + "\n")[:-cut])
    watched(run_dir)
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == again
    assert sorted(row["step"] for row in rows(run_dir)) == [10, 20, LAST]
    assert (json.loads((run_dir / "best.json").read_text())["value"] == 0.5) == (cut == 1)


def test_what_is_removed_was_missed_and_what_is_damaged_is_passed_over(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While checkpoint 10 is evaluated, the trainer removes 20, and 30 comes and goes; 35 is damaged."""
    saver = Saver(json.loads((run_dir / "checkpoints" / "20" / "record.json").read_text())["meta"])
    saver.save(run_dir, 35)
    victim = next(path for path in (run_dir / "checkpoints" / "35").rglob("*") if path.parent.name == "d")
    victim.write_bytes(victim.read_bytes()[:-1])
    moments = iter(range(1000))

    def stop() -> bool:
        match next(moments):
            case 0:
                shutil.rmtree(run_dir / "checkpoints" / "20")
                saver.save(run_dir, 30)
                time.sleep(1.1 * agenda.LOOK_S)
            case 1:  # the watcher has looked once more
                shutil.rmtree(run_dir / "checkpoints" / "30")
        return False

    watched(run_dir, stop=stop)
    assert [row["step"] for row in rows(run_dir)] == [10, LAST]
    err = capsys.readouterr().err
    for step in (20, 30):
        assert err.count(f"checkpoint {step} of {run_dir} was removed before it could be evaluated: missed") == 1
    assert err.count("checkpoint 35 is passed over") == 1 and victim.name in err
    assert "2 missed: 20, 30" in err


def test_a_history_that_was_left_is_evaluated_anew_and_is_never_the_best(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Going back from 25 to 10: 20 bears other weights now, and what it was like before counts no more."""
    saver = Saver(json.loads((run_dir / "checkpoints" / "20" / "record.json").read_text())["meta"])
    old = {"step": 20, "split": "validation", "stride": 16, "bits_per_byte": 0.5, "loss": 1.0, "tasks": {}}
    history.add(run_dir / "eval.jsonl", old | {"step": 10, "rolled_back": None, "bits_per_byte": 99.0})
    history.add(run_dir / "eval.jsonl", old | {"rolled_back": None})
    history.add(run_dir / "eval.jsonl", old | {"step": 25})
    shutil.rmtree(run_dir / "checkpoints" / "20")
    saver.save(run_dir, 20, seed=7)
    history.add(run_dir / "rollbacks.jsonl", {"rollback": 1, "from_step": 25, "to_step": 10, "time": 1000.5})
    watched(run_dir)
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [20, LAST]
    assert {row["rolled_back"] for row in rows(run_dir)[-2:]} == {1000.5}
    best = json.loads((run_dir / "best.json").read_text())
    assert best["step"] in (20, LAST) and best["value"] > 1
    record = read(with_config(run_dir))
    assert [(row["step"], row["split"]) for row in record.evaluations] == [
        (step, "validation") for step in (10, 20, LAST)
    ]
    assert record.best["validation"].step == best["step"] and len(record.rollbacks) == 1


def with_config(run_dir: Path) -> Path:
    (run_dir / "config.json").write_text("{}")
    return run_dir


def test_what_is_missed_of_an_abandoned_history_is_nobody_s_loss(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = known_of(run_dir)
    assert agenda.decide(known) == Turn("evaluate", 10)
    shutil.rmtree(run_dir / "checkpoints" / "20")
    history.add(run_dir / "rollbacks.jsonl", {"rollback": 1, "to_step": 10, "time": 5.0})
    assert agenda.decide(known) == Turn("evaluate", 10)
    assert known.missed == [] and "missed" not in capsys.readouterr().err


def test_it_waits_and_says_for_what(
    tmp_path: Path, made: tuple[Path, Saver], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    known = known_of(run_dir)
    assert not agenda.is_there(known) and not agenda.is_there(known)
    run_dir.mkdir()
    assert agenda.is_there(known) and agenda.decide(known) == Turn("wait") and agenda.decide(known).what == "wait"
    made[1].save(run_dir, 25, kind="temporary")
    assert agenda.decide(known).what == "wait", "it is temporary"
    shutil.copytree(made[0] / "checkpoints" / "20", run_dir / "checkpoints" / "20")
    row = {"step": 20, "split": "validation", "stride": 16, "bits_per_byte": None, "loss": 1.0, "tasks": {"a": {}}}
    assert agenda.decide(known) == Turn("evaluate", 20)
    history.add(run_dir / "eval.jsonl", row | {"split": "test"})
    assert agenda.decide(known) == Turn("evaluate", 20)
    history.add(run_dir / "eval.jsonl", row)
    assert agenda.decide(known).what == "wait"
    assert agenda.decide(Agenda(run_dir, "validation", frozenset({"a", "b"}))) == Turn("evaluate", 20), (
        "b was not asked"
    )
    assert json.loads((run_dir / "best.json").read_text())["metric"] == "loss"
    assert capsys.readouterr().err.splitlines() == [
        f"waiting for {run_dir}, which is not there yet",
        f"waiting: {run_dir} has no checkpoint to evaluate yet",
        f"waiting: the newest checkpoint of {run_dir} is 20, the last will be {LAST}",
    ]
    shutil.copytree(made[0] / "checkpoints" / str(LAST), run_dir / "checkpoints" / str(LAST))
    assert agenda.decide(known) == Turn("evaluate", LAST, is_last=True)
    history.add(run_dir / "eval.jsonl", row | {"step": LAST})
    assert agenda.decide(known).what == "end"


def test_one_watcher_at_a_time_and_it_stops_when_asked(run_dir: Path) -> None:
    with sole_watcher(run_dir), pytest.raises(Refused, match=r"has a watcher at work already: process \d+ on"):
        watched(run_dir)
    watched(run_dir, stop=lambda: True)
    watched(run_dir / "nowhere", stop=lambda: True)
    assert not (run_dir / "eval.jsonl").exists() and not (run_dir / "nowhere").exists()


def test_the_best_is_the_lowest_of_one_measure() -> None:
    own = {"split": "test", "stride": 16}
    told = [{**own, "step": n, "bits_per_byte": bits} for n, bits in ((5, 2.0), (10, 1.5), (15, 1.5), (20, None))]
    shorter = {**own, "step": 1, "bits_per_byte": 0.1, "stride": 4}
    best = history.best_of(history.standing([shorter, *told], []), "test")
    assert best == history.Best(10, "test", "bits_per_byte", 1.5)
    assert history.best_of(told, "validation") is None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--step", "20"), "--step 20: nothing to do with --watch, which evaluates every checkpoint as it comes"),
        (("--lm-eval", "blimp"), "--lm-eval: nothing to do with --watch, which evaluates every checkpoint as it comes"),
    ],
)
def test_mistakes_in_arguments_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli_module.evaluate(["runs/none", "--watch", *arguments])
    assert str(caught.value) == line


@pytest.mark.slow
def test_beside_a_training_run_and_killed_twice_it_evaluates_each_checkpoint_once(start: Start, tmp_path: Path) -> None:
    """It is there before the run is; the first kill comes in mid-evaluation, the second leaves half a line behind."""
    write_texts(tmp_path / "texts")
    run_dir = tmp_path / "run"
    wishes = (
        f"data.dir={tmp_path / 'data'}", "data.source.kind=files", f"data.source.paths={tmp_path / 'texts'}",
        "data.validation_share=0.2", "data.test_share=0.2", "model.vocab_size=320", "train.steps=200",
        "checkpoint.every=40", "checkpoint.keep=5",
    )  # fmt: skip
    watching = ("-m", "llm_jax", "eval", str(run_dir), "--watch", "--json")
    steps = [40, 80, 120, 160, 200]

    def evaluated() -> int:
        return len(history.lines(run_dir / "eval.jsonl"))

    def began(err: Path) -> int:
        """The newest checkpoint that a watcher has begun with."""
        return max(
            (int(line.split()[1]) for line in err.read_text().splitlines() if " on one device" in line), default=0
        )

    watcher = start(*watching)
    wait_for(lambda: "which is not there yet" in watcher.stderr.read_text(), watcher)
    trainer = start(*train(run_dir, *wishes))
    for n in (1, 3):
        wait_for(lambda n=n: evaluated() >= n, watcher)
        # Then it has begun with the next one.
        wait_for(lambda n=n, err=watcher.stderr: evaluated() > n or began(err) > steps[n - 1], watcher)
        watcher.kill()
        if n == 3:
            with open(run_dir / "eval.jsonl", "a") as file:
                file.write('{"step": 160, "loss": 3.')
        watcher = start(*watching)
    ended = watcher.wait()
    assert ended.returncode == 0, ended.stderr
    assert "checkpoint 200 is the last, and is evaluated" in ended.stderr and "missed" not in ended.stderr
    done = trainer.wait()
    assert done.returncode == 0, done.stderr
    ours = rows(run_dir)
    assert [row["step"] for row in ours] == steps
    best = min(ours, key=lambda row: row["bits_per_byte"])
    told = json.loads((run_dir / "best.json").read_text())
    assert (told["step"], told["value"]) == (best["step"], best["bits_per_byte"])
    for row in ours:
        plain = evaluate_checkpoint(str(run_dir), row["step"], ALONE, split="validation", as_json=True)
        assert plain is not None and plain["tokens"] == row["tokens"]
        assert plain["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.slow
def test_several_processes_watch_as_one_and_a_signal_ends_their_wait(
    made: tuple[Path, Saver], run_dir: Path, start: Start
) -> None:
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    shutil.rmtree(run_dir / "checkpoints" / str(LAST))
    arguments = ("-m", "llm_jax", "eval", str(run_dir), "--watch", "--json")
    both = [start(*arguments, devices=2, env=job | {"JAX_PROCESS_ID": str(n)}) for n in range(2)]
    wait_for(lambda: "the last will be 40" in both[0].stderr.read_text(), both[0])
    assert [row["step"] for row in rows(run_dir)] == [10, 20]
    both[1].process.send_signal(signal.SIGTERM)
    assert [process.wait(60).returncode for process in both] == [75, 75]
    watched(run_dir, stop=lambda: True)
    for row in rows(run_dir):
        plain = evaluate_checkpoint(str(run_dir), row["step"], ALONE, split="validation", as_json=True)
        assert plain is not None and plain["loss"] == pytest.approx(row["loss"], rel=1e-5)
