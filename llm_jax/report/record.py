"""What a run directory says of a run: of a finished one, of one under way, of one that has only just begun."""

import array
import collections
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from pydantic_core import from_json

from llm_jax.config import ConfigError
from llm_jax.eval.history import EVALUATIONS, ROLLBACKS, Best, best_of, lines, standing
from llm_jax.model.config import ModelConfig
from llm_jax.train import flops
from llm_jax.train.environment import ENVIRONMENT
from llm_jax.train.metrics import METRICS, VALIDATION

CONFIG = "config.json"

# Floats by name, all of one length; NaN is what is not known or not finite.
Columns = Mapping[str, np.ndarray]

ROUTING = ("load_max_over_mean", "router_entropy", "dropped")
UPDATES = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "data_wait", "finite", "time", *ROUTING)
LOOKS = ("step", "loss", "perplexity", "bits_per_byte", "accuracy")


@dataclass(frozen=True)
class Record:
    """A run as its directory tells it."""

    directory: Path
    config: Mapping[str, Any]
    """config.json's tree; empty where there is none."""
    updates: Columns
    """metrics.jsonl's lines, in the order of their steps."""
    looks: Columns
    """validation.jsonl's lines, in the order of their steps."""
    evaluations: Sequence[Mapping[str, Any]]
    """eval.jsonl's newest row of held-out text for each step and split, in that order; none of what was left behind."""
    rollbacks: Sequence[Mapping[str, Any]]
    """rollbacks.jsonl's lines."""
    attempts: Sequence[Mapping[str, Any]]
    """environment.json's attempts, the oldest first."""
    expert_load: Sequence[float]
    """Each expert's share of the last recorded update's choices; empty without experts."""

    @property
    def name(self) -> str:
        """What the run calls itself, or its directory's name."""
        return str(self.config.get("name") or self.directory.resolve().name)

    @property
    def masked(self) -> bool:
        """Whether it predicts hidden tokens, and not the next one."""
        return at(self.config, "objective.name") == "mlm"

    @property
    def done(self) -> int:
        """Updates made."""
        steps = self.updates["step"]
        return int(steps[-1]) if len(steps) else 0

    @property
    def steps(self) -> int | None:
        """Updates of the whole run; None where its config does not say."""
        steps = at(self.config, "train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def skipped(self) -> np.ndarray:
        """Steps of the updates that were skipped because they were not finite."""
        return self.updates["step"][self.updates["finite"] == 0]

    @property
    def tokens(self) -> float:
        """Tokens trained on."""
        return float(np.nansum(self.updates["tokens"]))

    @property
    def seconds(self) -> float:
        """Wall time from update to update, evaluations and checkpoints in it, pauses between attempts not."""
        # An attempt's first update has no speed: what lies before it is a start, or the time nobody trained.
        known = np.isfinite(self.updates["tokens_per_s"][1:])
        return float(np.nansum(np.where(known, np.diff(self.updates["time"]), 0.0)))

    @property
    def parameters(self) -> int | None:
        """Trained numbers; None where the config is not one of this version's."""
        try:
            return flops.parameters(ModelConfig.model_validate_json(json.dumps(self.config.get("model"))))
        except pydantic.ValidationError:
            return None

    @property
    def best(self) -> Mapping[str, Best]:
        """The best evaluation of each split on which there are several."""
        splits = collections.Counter(row["split"] for row in self.evaluations)
        found = {split: best_of(self.evaluations, split) for split, n in splits.items() if n > 1}
        return {split: best for split, best in found.items() if best is not None}

    def newest(self, split: str) -> Mapping[str, Any] | None:
        """The evaluation of the highest step on a split."""
        return next((row for row in reversed(self.evaluations) if row.get("split") == split), None)


def read(directory: str | Path) -> Record:
    """The record of a run directory. Raises ConfigError if it holds no run."""
    path = Path(directory)
    if not path.is_dir():
        raise ConfigError(f"{path}: {'is no directory' if path.exists() else 'no such run directory'}")
    if not any((path / name).exists() for name in (CONFIG, METRICS)):
        raise ConfigError(f"{path}: holds no run: there is neither {CONFIG} nor {METRICS}")
    attempts = _object(path / ENVIRONMENT).get("attempts")
    rollbacks = lines(path / ROLLBACKS)
    return Record(
        directory=path,
        config=_object(path / CONFIG),
        updates=read_columns(path / METRICS, UPDATES),
        looks=read_columns(path / VALIDATION, LOOKS),
        evaluations=standing(lines(path / EVALUATIONS), rollbacks),
        rollbacks=rollbacks,
        attempts=[a for a in attempts if isinstance(a, dict)] if isinstance(attempts, list) else [],
        expert_load=_last_load(path / METRICS),
    )


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """The named numbers of a file's JSON lines, sorted by step; of a step given twice, the later line counts."""
    columns = [array.array("d") for _ in names]
    for line in _lines(path, from_json):  # reads a million lines in a third of the json module's time
        for name, column in zip(names, columns, strict=True):
            column.append(number(line.get(name)))
    table = {name: np.frombuffer(column, np.float64) for name, column in zip(names, columns, strict=True)}
    # Of equal steps np.unique takes the first, so it is shown the last one first.
    steps, places = np.unique(table["step"][::-1], return_index=True)
    chosen = len(table["step"]) - 1 - places[np.isfinite(steps)]
    return {name: column[chosen] for name, column in table.items()}


def number(value: Any) -> float:
    """A JSON value as a float; NaN for what is no finite number."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def at(tree: Mapping[str, Any], path: str, missing: Any = None) -> Any:
    """The value at a dotted path of a tree, or what stands for a missing one."""
    node: Any = tree
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return missing
        node = node[name]
    return node


def _last_load(path: Path) -> Sequence[float]:
    load: Any = None
    for line in _lines(path, from_json, last_bytes=1 << 20):
        load = line.get("expert_load", load)
    return [number(share) for share in load] if isinstance(load, list) else []


def _lines(path: Path, parse: Callable[[bytes], Any], last_bytes: int | None = None) -> Iterator[Mapping[str, Any]]:
    """The JSON objects among a file's lines; a run under way may be in the middle of writing its last one.

    last_bytes: only those that lie whole in so many bytes at the end.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        if last_bytes is not None:
            file.seek(max(0, path.stat().st_size - last_bytes))
        for raw in file:
            line = _parsed(raw, parse)
            if isinstance(line, dict):
                yield line


def _object(path: Path) -> Mapping[str, Any]:
    parsed = _parsed(path.read_bytes(), json.loads) if path.exists() else None
    return parsed if isinstance(parsed, dict) else {}


def _parsed(text: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(text)
    except ValueError:
        return None
