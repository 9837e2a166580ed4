"""`llm-jax config`: a run's every field with its value, what it accepts and its help. Imports no jax."""

import json
from collections.abc import Sequence
from typing import Any

from llm_jax import command_line, run
from llm_jax.config import ABSENT, Config, Row, describe, to_json
from llm_jax.exit_codes import DONE
from llm_jax.field_types import SECTION
from llm_jax.run import Run
from llm_jax.train import flops

_EXAMPLES = """\
  llm-jax config configs/quickstart.py
  llm-jax config configs/quickstart.py model.n_layers=6 optim.lr=2e-3 --json
  llm-jax config configs/quickstart.py data.source.kind=files data.source.paths=my/texts

values: 3, 1e-3, true, null, text, '["a", "b"]' (in quotes for the shell); a list of one may be given as its item;
a section takes a JSON object: 'model={"d_model": 128, "n_heads": 4}'; the order of overrides does not matter"""

_WIDEST = 48  # a longer cell pushes the rest of its own line only


def main(argv: Sequence[str]) -> int:
    """Prints the run of a config file and overrides. Raises ConfigError."""
    parser = command_line.Parser(
        "config", "Show a run: every field, its value, what it accepts, and its help.", _EXAMPLES
    )
    command_line.add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the run as JSON, as checkpoints hold it")
    arguments = parser.read(argv)
    shown = run.from_command_line(arguments.config, arguments.overrides)
    print(to_json(shown) if arguments.json else f"{table(shown)}\n{summary(shown)}\n", end="")
    return DONE


def summary(shown: Run) -> str:
    """A line of what follows from the fields: parameters, as papers count them, and arithmetic."""
    model = shown.model
    published, stored = flops.parameters(model, padded=False), flops.parameters(model)
    parts = [f"{published:,} parameters"]
    if stored != published:
        parts.append(f"{stored:,} with the padded vocabulary")
    if model.moe is not None:
        parts.append(f"{flops.active_parameters(model, padded=False):,} of them for a token")
    per_token = flops.flops_per_token(model, shown.data.seq_len, shown.objective).full
    parts.append(f"{per_token:.3g} FLOPs to train on a token ({flops.CONVENTION})")
    return "; ".join(parts)


def table(config: Config) -> str:
    """Aligned lines, a block for each section; * marks the values that are not the defaults."""
    rows = describe(config)
    helps = {row.path: row.help for row in rows if row.words == SECTION}
    blocks: dict[str, list[Row]] = {"": [], **{path: [] for path in helps}}
    for row in rows:
        if row.words != SECTION:
            blocks[row.path.rpartition(".")[0]].append(row)
    lines = [f"{type(config).__name__} (* is not the default)"]
    for section, fields in blocks.items():
        if section:
            lines += ["", f"{section}: {helps[section]}"]
        cells = [("*" if row.changed else " ", row.path, _text(row.value), _accepted(row), row.help) for row in fields]
        widths = [min(max(map(len, column)), _WIDEST) for column in zip(*cells, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
    return "\n".join(lines) + "\n"


def _accepted(row: Row) -> str:
    if not row.changed:
        return row.words
    return f"{row.words}; {'no default' if row.default is ABSENT else f'default {_text(row.default)}'}"


def _text(value: Any) -> str:
    """A value as an override is typed."""
    plain = isinstance(value, str) and value and not any(char.isspace() for char in value)
    return value if plain else json.dumps(value, ensure_ascii=False)
