"""Killed at any moment, a run goes on as if nothing had been; and a history that is another one is seen to be."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import kill_loop
from tests.conftest import EMULATED, ROOT, Start
from tests.kills import EVERY, OVERRIDES, STEPS, Trial, begun, differences, to_the_end
from tests.training import newest, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A run that nobody killed."""
    trial = Trial(tmp_path_factory.mktemp("whole") / "run", 1, Path(EMULATED["JAX_COMPILATION_CACHE_DIR"]))
    to_the_end(trial)
    return trial


@pytest.mark.slow
def test_four_kills_do_not_change_a_bit(start: Start) -> None:
    """As benchmarks/kill_loop.py does it with a hundred."""
    done = start(str(ROOT / "benchmarks" / "kill_loop.py"), "--kills", "4", "--processes", "1", "2").wait(1800)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    tallies = {line["processes"]: line["tally"] for line in lines if "tally" in line}
    assert {n: tally["kills"] for n, tally in tallies.items()} == {1: 2, 2: 2}, done.stdout
    assert sum("kill" in line for line in lines) == 4
    assert all(line["differences"] == [] for line in lines if "differences" in line)


def edit(change: Callable[[list[str]], list[str]], name: str = "metrics.jsonl") -> Callable[[Path], None]:
    def apply(run_dir: Path) -> None:
        lines = (run_dir / name).read_text().splitlines(keepends=True)
        (run_dir / name).write_text("".join(change(lines)))

    return apply


def other_loss(line: str) -> str:
    """The same update with a loss whose last digit is another."""
    tree = json.loads(line)
    return json.dumps(tree | {"loss": tree["loss"] * (1 + 1e-7)}) + "\n"


def other_batch(line: str, batch: int) -> str:
    return json.dumps(json.loads(line) | {"batch_index": batch}) + "\n"


DOCTORED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an update twice": (edit(lambda lines: [*lines[:20], *lines[19:]]), "the updates written down"),
    "an update left out": (edit(lambda lines: [*lines[:20], *lines[21:]]), "the updates written down"),
    "a batch twice": (
        edit(lambda lines: [*lines[:20], other_batch(lines[20], 19), *lines[21:]]),
        "the batches trained",
    ),
    "another last digit": (edit(lambda lines: [*lines[:-1], other_loss(lines[-1])]), "metrics.jsonl: 60 and 60 lines"),
    "a look left out": (edit(lambda lines: lines[:-1], "validation.jsonl"), "validation.jsonl: 6 and 7 lines"),
    "a checkpoint too few": (lambda run_dir: shutil.rmtree(run_dir / "checkpoints" / "50"), "checkpoints [50] are not"),
    "a checkpoint unfinished": (lambda run_dir: (run_dir / "checkpoints" / "9.tmp").mkdir(), "beside the checkpoints"),
    "a checkpoint damaged": (lambda run_dir: (run_dir / "checkpoints" / "60" / "record.json").unlink(), "not intact"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCTORED)
def test_another_history_is_seen(whole: Trial, tmp_path: Path, name: str) -> None:
    change, told = DOCTORED[name]
    copy = tmp_path / "run"
    shutil.copytree(whole.run_dir, copy)
    assert differences(copy, whole.run_dir) == []
    change(copy)
    assert any(told in found for found in differences(copy, whole.run_dir))


def planted(line: str) -> tuple[str, ...]:
    return ("-c", f"import sys\n{line}\nfrom llm_jax.__main__ import main\nsys.exit(main(sys.argv[1:]))")


PLANTED = {
    "a resume that repeats a batch": (
        """
from llm_jax.train import loop
stream = loop.stream
loop.stream = lambda rows, *, start, **rest: stream(rows, start=max(start - 1, 0), **rest)
""",
        ["the batches trained", "metrics.jsonl", "arrays of other bits"],
    ),
    "a log that keeps what a killed process wrote": (
        """
from llm_jax.train import metrics
metrics.drop_after = lambda path, step: -1
""",
        ["the updates written down", "the batches trained", "metrics.jsonl"],
    ),
    "a checkpoint that is whole before its lines are written": (
        """
import io
from llm_jax.train import metrics
# Lines stay in the process until it ends.
class Lazy(io.TextIOWrapper):
    def flush(self):
        pass
def lazily(path, mode, encoding):
    return Lazy(io.BufferedWriter(io.FileIO(path, mode), 1 << 20), encoding=encoding)
metrics.open = lambda path, mode, encoding=None: (lazily if mode == "a" else open)(path, mode, encoding=encoding)
""",
        ["the updates written down", "the batches trained", "metrics.jsonl"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", PLANTED)
def test_planted_defects_are_seen(whole: Trial, tmp_path: Path, defect: str) -> None:
    """One kill is enough: after the first checkpoint, with updates of which there is none yet."""
    lines, told = PLANTED[defect]
    trial = whole._replace(run_dir=tmp_path / "run", program=planted(lines))
    with begun(trial) as life:
        while newest(trial.run_dir) < EVERY and life.goes_on():
            time.sleep(0.002)
        time.sleep(0.05)
        life.kill([0])
    to_the_end(trial)
    found = differences(trial.run_dir, whole.run_dir)
    assert all(any(line.startswith(start) for line in found) for start in told), found


@pytest.mark.slow
def test_the_last_look_is_made_up_for(whole: Trial, start: Start, tmp_path: Path) -> None:
    """Killed after the last checkpoint and before the last look at held-out rows, which comes after it."""
    copy = tmp_path / "run"
    shutil.copytree(whole.run_dir, copy)
    edit(lambda lines: lines[:-1], "validation.jsonl")(copy)
    done = start(*train(copy, *OVERRIDES)).wait()
    assert done.returncode == 0 and f"done: {STEPS} steps" in done.stdout, done.stderr
    assert differences(copy, whole.run_dir) == []


def test_a_section_of_the_page_replaces_its_like() -> None:
    page = f"# Title\n\n{kill_loop.HEADING}\nold\n\n## Another\n\ntext\n"
    new = kill_loop.with_section(page, "\nnew\n")
    assert new == f"# Title\n\n{kill_loop.HEADING}\nnew\n\n## Another\n\ntext\n"
    assert kill_loop.with_section(new, "\nnew\n") == new
    assert kill_loop.with_section("# Title\n", "\nnew\n") == f"# Title\n\n{kill_loop.HEADING}\nnew\n"
