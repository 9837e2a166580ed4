"""`llm-jax data prepare` and `llm-jax data show`: make the rows, and look at them."""

import time
from collections.abc import Sequence

import numpy as np

from llm_jax import command_line
from llm_jax.config import ConfigError
from llm_jax.data.prepare import is_prepared, open_prepared, prepare
from llm_jax.data.show import show_row
from llm_jax.data.stages import rows_summary, text_summary
from llm_jax.exit_codes import DONE
from llm_jax.run import from_command_line

_PREPARE_EXAMPLES = """\
  llm-jax data prepare configs/quickstart.py
  llm-jax data prepare configs/quickstart.py data.source.kind=files data.source.paths=my/texts"""

_USAGE = """\
usage: llm-jax data prepare CONFIG [path=value ...]
       llm-jax data show CONFIG [path=value ...] [--step T] [--rows N]

Make a run's text, tokenizer and rows, or print rows of a batch as text; each has its own --help."""

_SHOW_EXAMPLES = """\
  llm-jax data show configs/quickstart.py --step 0
  llm-jax data show configs/quickstart.py --step 100 --rows 2"""


def main(argv: Sequence[str]) -> int:
    """Raises ConfigError, DataError or DiskError."""
    match list(argv):
        case ["prepare", *rest]:
            return _prepare(rest)
        case ["show", *rest]:
            return _show(rest)
        case ["-h" | "--help", *_]:
            print(f"{_USAGE}\n\nexamples:\n{_PREPARE_EXAMPLES}\n{_SHOW_EXAMPLES}")
            return DONE
        case _:
            raise ConfigError(f"llm-jax data {' '.join(argv[:1])}: say data prepare or data show, then a config file")


def _prepare(argv: Sequence[str]) -> int:
    parser = command_line.Parser(
        "data prepare", "Make a run's text, tokenizer and rows; what is there is used.", _PREPARE_EXAMPLES
    )
    command_line.add_run_arguments(parser)
    arguments = parser.read(argv)
    run = from_command_line(arguments.config, arguments.overrides)
    wanted = run.data, run.tokenizer, run.model.vocab_size, run.seed
    begin = time.monotonic()
    if is_prepared(*wanted):
        prepared = open_prepared(*wanted)
        print("already prepared")
        print(f"text: {text_summary(prepared.text_info)}")
        print(f"rows: {rows_summary(prepared.rows_info, prepared.seq_len)}")
    else:
        prepared = prepare(*wanted)
        print(f"prepared in {time.monotonic() - begin:.1f} s")
    print(f"{prepared.text.parent}: fingerprint {prepared.fingerprint[:16]}")
    return DONE


def _show(argv: Sequence[str]) -> int:
    parser = command_line.Parser("data show", "Print rows of a batch as text, document by document.", _SHOW_EXAMPLES)
    command_line.add_run_arguments(parser)
    parser.add_argument("--step", type=int, default=0, help="number of the batch (default 0)")
    parser.add_argument("--rows", type=int, default=4, help="how many of its rows (default 4)")
    arguments = parser.read(argv)
    run = from_command_line(arguments.config, arguments.overrides)
    if arguments.step < 0 or arguments.rows < 1:
        raise ConfigError("llm-jax data show: --step is 0 or more, --rows 1 or more")
    prepared = open_prepared(run.data, run.tokenizer, run.model.vocab_size, run.seed)
    from llm_jax.data.loader import open_rows  # imports jax, for which a mistake above need not wait

    rows = open_rows(prepared, "train", run.seed)
    first = arguments.step * run.train.batch_rows
    index_N = first + np.arange(min(arguments.rows, run.train.batch_rows))
    print(f"batch {arguments.step} of {run.train.batch_rows} rows; an epoch is {len(rows)} rows")
    for n, row_U in enumerate(rows[index_N]):
        print(f"=== row {n} (epoch {(first + n) // len(rows)})")
        print(show_row(row_U, prepared.tokenizer))
    return DONE
