"""`llm-jax eval --watch`: every checkpoint once, in order, whoever is killed; and what eval.jsonl says is so."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from llm_jax.checkpoint import Checkpoints
from llm_jax.data.prepare import prepare
from llm_jax.eval.agenda import Agenda
from llm_jax.eval.evaluation import evaluate_checkpoint
from llm_jax.eval.watch import watch
from llm_jax.guards import Stop, never
from llm_jax.manifest import Kind
from llm_jax.model.paths import to_tree
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import TrainConfig
from llm_jax.train.start import checkpoint_meta
from llm_jax.train.state import init_state
from tests.small import mesh_of
from tests.test_eval_verbs import MODEL, text_source, write_texts

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


def _state(seed: int) -> Any:
    return jax.jit(lambda seed: init_state(MODEL, AdamWConfig(), seed))(seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saver]:
    """A run of 40 updates with checkpoints 10, 20, a temporary one, and 40."""
    root = tmp_path_factory.mktemp("watched")
    write_texts(root / "texts")
    run = Run(
        name="watched", run_dir=str(root / "run"), model=MODEL, data=text_source(root), train=TrainConfig(steps=LAST)
    )
    prepared = prepare(run.data, run.tokenizer, MODEL.vocab_size, run.seed, report=lambda line: None)
    saver = Saver(checkpoint_meta(run, prepared, {}))
    for step in (10, 20, LAST):
        saver.save(root / "run", step)
    saver.save(root / "run", 25, kind="temporary")
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
