"""`llm-jax inspect`: its arguments, read before what takes seconds to import."""

from collections.abc import Sequence
from pathlib import Path

from llm_jax.command_line import Parser
from llm_jax.config import ConfigError
from llm_jax.early_signals import leaving_at_once


def main(argv: Sequence[str]) -> int:
    """The verb; returns its exit code. Raises Failure for what is foreseen."""
    with leaving_at_once():
        return _inspect(argv)


def _inspect(argv: Sequence[str]) -> int:
    parser = Parser(
        "inspect",
        "Shows what a checkpoint makes of a text, as one HTML page: what each token costs, whom each head looks at,\n"
        "what each layer would say (the logit lens), and whom the routers choose.",
        '  llm-jax inspect runs/quickstart --text "def main(argv):"     writes runs/quickstart/inspect.html\n'
        "  llm-jax inspect runs/quickstart --file setup.py --step 500 --out page.html",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's directory, such as runs/quickstart")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="path=value", help="change a field of eval or mesh, or data.dir"
    )
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest intact one)")
    parser.add_argument("--text", help="the text")
    parser.add_argument("--file", metavar="FILE", help="a file that holds the text, UTF-8")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to (default: inspect.html in the run's directory)"
    )
    arguments = parser.read(argv)
    text = read_text(arguments.text, arguments.file)
    from llm_jax.eval.evaluation import until_stopped
    from llm_jax.inspection.look import inspect_checkpoint

    where = (arguments.run_dir, arguments.step, arguments.overrides)
    return until_stopped(lambda stop: inspect_checkpoint(*where, text, arguments.out, stop))


def read_text(text: str | None, file: str | None) -> str:
    """The text that is given as it stands, or in a file. Raises ConfigError for none, two, and what has no token."""
    if (text is None) == (file is None):
        raise ConfigError("--text and --file: give one of the two")
    if file is not None:
        whose = f"--file {file}"
        try:
            text = Path(file).read_bytes().decode()
        except OSError as error:
            raise ConfigError(f"{whose}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{whose}: is not UTF-8 at byte {error.start}") from None
    else:
        assert text is not None
        whose = "--text" if text.isspace() or not text else f"--text {text!a}"
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ConfigError(f"{whose}: is not UTF-8")
    if not text.strip():
        raise ConfigError(f"{whose}: {'has nothing but blanks' if text else 'is empty'}")
    return text
