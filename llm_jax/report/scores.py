"""What a model can tell apart, as tables: the default suite, and tasks of the user's."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from llm_jax.report.html import Child, element, table
from llm_jax.report.parts import named, section
from llm_jax.report.record import Record, number
from llm_jax.report.words import UNKNOWN, count, fixed

Row = Mapping[str, Any]

ABOUT = (
    "Held-out Python, and the same with one wrong edit: how often the model finds the original likelier. Beside it "
    "stand the model before training, and saying always that what has fewer tokens is right. Behind "
    "\N{PLUS-MINUS SIGN} is half of the 95% interval."
)


def suite(records: Sequence[Record]) -> Element | None:
    """The default suite by kind; of several runs, their accuracies side by side; None where nobody has one."""
    shown = [(run, record, told) for run, record in enumerate(records) if (told := _newest(record, _suite)) is not None]
    if not shown:
        return None
    if len(records) == 1:
        ((_, _, told),) = shown
        head = ("One wrong edit", "Pairs", "Accuracy", "Untrained", "Fewer tokens wins")
        rows = [[_kind(kind), *_alone(figures)] for kind, figures in _kinds(told)]
        parts: list[Child] = [table(head, rows, {"class": "numbers"})]
        parts += [element("p", {"class": "note"}, line) for line in _left_out(told)]
    else:
        names = dict.fromkeys(kind for _, _, told in shown for kind, _ in _kinds(told) if kind != "all")
        head = ["One wrong edit", *(named(record, run) for run, record, _ in shown)]
        columns = [dict(_kinds(told)) for _, _, told in shown]
        rows = [
            [_kind(kind), *(plus_minus(column.get(kind, {}).get("accuracy")) for column in columns)]
            for kind in [*names, "all"]
        ]
        parts = [table(head, rows, {"class": "numbers"})]
    return section("What it tells apart", element("p", {"class": "note"}, ABOUT), *parts)


def tasks(records: Sequence[Record]) -> Element | None:
    """A row for each figure of each of the user's tasks, and for each of its groups; None where there are none."""
    rows: list[list[Child]] = []
    for run, record in enumerate(records):
        for name, told in (_newest(record, _tasks) or {}).items():
            label = [named(record, run, name)] if len(records) > 1 else [name]
            rows += [[*label, *cells] for cells in _figures(told)]
            groups = _mapping(told.get("by"))
            for group, figure in groups.items() if len(groups) > 1 else ():
                indented = element("span", {"class": "group"}, str(group))
                rows.append([indented, count(_mapping(figure).get("n")), "", plus_minus(figure), ""])
    if not rows:
        return None
    return section("Tasks", table(("Task", "Items", "Figure", "Value", "By chance"), rows, {"class": "numbers"}))


def plus_minus(figure: Any) -> str:
    """An estimate and its error, as far as they are known."""
    told = _mapping(figure)
    value, low, high = (number(told.get(name)) for name in ("value", "low", "high"))
    error = (high - low) / 2
    return fixed(value, 3) + (
        f" \N{PLUS-MINUS SIGN} {error:.3f}" if math.isfinite(value) and math.isfinite(error) else ""
    )


def _figures(told: Row) -> list[list[Child]]:
    chance = number(told.get("chance"))
    return [
        [
            count(told.get("n")),
            str(metric).replace("_", " "),
            plus_minus(figure),
            f"{chance:.3f}" if math.isfinite(chance) and metric not in ("ece", "confidence") else "",
        ]
        for metric, figure in _mapping(told.get("metrics")).items()
    ]


def _newest(record: Record, part: Any) -> Any:
    """A part of the newest evaluation that has it, one of test text where there is one."""
    rows = sorted(record.evaluations, key=lambda row: (row.get("split") == "test", number(row.get("step"))))
    return next((told for row in reversed(rows) if (told := part(row))), None)


def _suite(row: Row) -> Row | None:
    told = _mapping(row.get("suite"))
    return told if any(True for _ in _kinds(told)) or _left_out(told) else None


def _tasks(row: Row) -> Mapping[str, Row]:
    return {str(name): told for name, told in _mapping(row.get("tasks")).items() if isinstance(told, Mapping)}


def _kinds(told: Row) -> list[tuple[str, Row]]:
    kinds = {**_mapping(told.get("kinds")), "all": told.get("all")}
    return [(str(kind), figures) for kind, figures in kinds.items() if isinstance(figures, Mapping)]


def _left_out(told: Row) -> list[str]:
    return [f"{kind} is left out: {why}" for kind, why in _mapping(told.get("left_out")).items()]


def _alone(figures: Row) -> list[Child]:
    accuracy, before = (plus_minus(figures.get(name)) for name in ("accuracy", "untrained"))
    better = element("strong", None, accuracy) if accuracy != UNKNOWN else accuracy
    return [count(figures.get("n")), better, before, fixed(figures.get("fewer_tokens_wins"), 3)]


def _kind(kind: str) -> Child:
    return element("strong", None, "all together") if kind == "all" else kind


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
