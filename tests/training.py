"""A small run of `llm-jax train` as a real process, and what to compare of two histories."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.conftest import ROOT, Running

DATA = f"data.dir={ROOT / '.cache' / 'data'}"
STEPS = 24
# Small enough for a second of compiling. Each checkpoint costs as much CPU time as ten updates.
SMALL = (
    DATA, "model.d_model=32", "model.d_ff=64", "model.n_heads=8", "model.n_kv_heads=8", "model.d_head=8",
    "data.seq_len=64", f"train.steps={STEPS}", "optim.warmup_steps=5", "checkpoint.every=4", "eval.every=0",
    "eval.batch_rows=8", f"logging.every={STEPS}",
)  # fmt: skip
# All else must be bit for bit the same.
TIMES = ("tokens_per_s", "mfu", "data_wait", "checkpoint_stall", "time")


def train(run_dir: Path, *overrides: str, config: str = "tiny_causal") -> list[str]:
    """The command line; an override replaces SMALL's of the same path."""
    wishes = {wish.partition("=")[0]: wish for wish in (*SMALL, f"run_dir={run_dir}", *overrides)}
    return ["-m", "llm_jax", "train", str(ROOT / "configs" / f"{config}.py"), *wishes.values()]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[dict]:
    """What must be bit for bit the same of each update, in the order of the file."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(run_dir)]


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read by Orbax alone."""
    folder = (run_dir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        return dict(_flat("", checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=as_numpy))))


def _flat(path: str, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(f"{path}/{key}", value)
    else:
        yield path, tree


def assert_same_history(run_dir: Path, other: Path, step: int = STEPS) -> None:
    assert curve(run_dir) == curve(other)
    ours, theirs = arrays(run_dir, step), arrays(other, step)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.tobytes() == theirs[name].tobytes(), name


def assert_close(run_dir: Path, other: Path, tolerance: float, steps: int | None = None) -> None:
    """The same batches, and losses within a relative tolerance; of the other run its first `steps` alone."""
    ours, theirs = lines(run_dir), lines(other)[:steps]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["batch_hash"] for line in ours] == [line["batch_hash"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] - b["loss"]) <= tolerance * abs(b["loss"]), (a["step"], a["loss"], b["loss"])


def wait_for(condition: Callable[[], bool], running: Running, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert running.process.poll() is None, running.done()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def is_saving(run_dir: Path, step: int) -> bool:
    """Whether the checkpoint of that step or a later one is half-written."""
    return any(int(p.name.split(".")[0]) >= step for p in half_written(run_dir))


def has_lines(run_dir: Path, n: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(steps_written(run_dir)) >= n


def half_written(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("[0-9]*.orbax-checkpoint-tmp"))


def newest(run_dir: Path) -> int:
    folder = run_dir / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0)


def steps_written(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def copy_at(run_dir: Path, tmp_path: Path, step: int) -> Path:
    """A copy as it was after the checkpoint of that step, with lines of a later life that never got a checkpoint."""
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return copy
