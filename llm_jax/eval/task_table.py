"""Tasks and the default suite as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llm_jax.eval.bootstrap import Estimate, error


def suite_table(suite: Mapping[str, Any]) -> Table:
    """A row for each kind of corruption, and one for all."""
    table = Table("one wrong edit", "pairs", "accuracy", "untrained", "fewer tokens wins")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, told in [*suite["kinds"].items(), ("all", suite["all"])]:
        length = f"{told['fewer_tokens_wins']:.3f}"
        table.add_row(kind, str(told["n"]), plus_minus(told["accuracy"]), plus_minus(told["untrained"]), length)
    return table


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each figure of each task, and for each of its groups where there are several."""
    table = Table("task", "n", "figure", "value", "by chance")
    for column in (table.columns[1], table.columns[3], table.columns[4]):
        column.justify = "right"
    for name, told in tasks.items():
        for metric, figure in told["metrics"].items():
            chance = told.get("chance")
            by_chance = f"{chance:.3f}" if chance is not None and metric not in ("ece", "confidence") else ""
            table.add_row(name, str(told["n"]), metric.replace("_", " "), plus_minus(figure), by_chance)
        groups = told.get("by", {})
        if len(groups) > 1:
            for group, figure in groups.items():
                table.add_row(f"  {group}", str(figure["n"]), "", plus_minus(figure), "")
    return table


def plus_minus(figure: Estimate) -> str:
    """The value and its error."""
    return f"{figure['value']:.3f} \N{PLUS-MINUS SIGN} {error(figure):.3f}"
