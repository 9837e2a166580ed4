"""`llm-jax report`: one HTML file on one run or several, and the same curves as pictures."""

from collections.abc import Sequence
from pathlib import Path

from llm_jax import exit_codes
from llm_jax.command_line import Parser
from llm_jax.report.page import render
from llm_jax.report.record import read
from llm_jax.report.screenshot import take

_EXAMPLES = """\
  llm-jax report runs/quickstart                        writes runs/quickstart/report.html
  llm-jax report runs/narrow runs/wide                  compares them, in runs/comparison.html
  llm-jax report runs/quickstart --svg pictures         the curves as pictures too (needs matplotlib)
  llm-jax report runs/quickstart --screenshot page.png  the page as a picture too (needs a browser)"""


class ReportError(exit_codes.Failure):
    """The report cannot be written."""

    exit_code = exit_codes.CHECKPOINT


def main(argv: Sequence[str]) -> int:
    """The verb; returns its exit code. Raises Failure for what is foreseen."""
    parser = Parser(
        "report",
        "Writes what happened in a run as one HTML file that opens from disk: figures beside zlib and lzma, curves,\n"
        "evaluations, a sample, the config and its differences between runs, and what it ran on.",
        _EXAMPLES,
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run directories; only read")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to (default: report.html in the run's directory, of several comparison.html beside the first)",
    )
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--svg", type=Path, metavar="DIR", help="write each chart as an SVG picture into DIR too")
    pictures.add_argument("--png", type=Path, metavar="DIR", help="write each chart as a PNG picture into DIR too")
    parser.add_argument(
        "--screenshot", type=Path, metavar="FILE", help="write the upper part of the page as a PNG picture too"
    )
    arguments = parser.read(argv)
    records = [read(directory) for directory in dict.fromkeys(arguments.run_dirs)]
    out = arguments.out or default_out([record.directory for record in records])
    folder = arguments.svg or arguments.png
    written = [out]
    try:
        if folder is not None:
            from llm_jax.report.pictures import draw

            written += draw(records, folder, "svg" if arguments.svg else "png")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(records, out), encoding="utf-8")
        if arguments.screenshot is not None:
            take(out, arguments.screenshot)
            written.append(arguments.screenshot)
    except OSError as error:
        raise ReportError(f"{error.filename or out} cannot be written: {error.strerror}") from None
    for path in written:
        print(path)
    return exit_codes.DONE


def default_out(directories: Sequence[Path]) -> Path:
    """In the run's directory, or beside the first of several."""
    first = directories[0]
    return first / "report.html" if len(directories) == 1 else first.parent / "comparison.html"
