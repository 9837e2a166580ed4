"""How a verb reads its command line: argparse, whose mistakes are one line, and the arguments verbs share. No jax."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from llm_jax.config import ConfigError


class Parser(argparse.ArgumentParser):
    """A verb's arguments. `read` raises ConfigError; --help prints and exits with 0."""

    def __init__(self, verb: str, description: str, examples: str) -> None:
        super().__init__(
            f"llm-jax {verb}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage."""
        raise ConfigError(f"{self.prog}: {message}; {self.prog} --help shows how it is used")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, options anywhere among them. Raises ConfigError with a line for each unknown one."""
        arguments, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            # argparse gives up on what follows an unknown option too; that alone is not the user's mistake.
            options = [argument for argument in unknown if argument.startswith("-")]
            raise ConfigError(*(self._tell_unknown(argument) for argument in options or unknown))
        return arguments

    def _tell_unknown(self, argument: str) -> str:
        option, equals, _ = argument.partition("=")
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        if close:
            return f"{self.prog}: {argument}: no such option; did you mean {close[0]}?"
        if equals:
            return f"{self.prog}: {argument}: no such option; an override has no dashes: {argument.lstrip('-')}"
        return f"{self.prog}: {argument}: not understood; {self.prog} --help shows how it is used"


def add_run_arguments(parser: Parser) -> None:
    """Adds `config` and `overrides`, which `run.from_command_line` takes."""
    parser.add_argument("config", help="a config file such as configs/quickstart.py: Python, executed, so trust it")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # else argparse takes it for required
        metavar="path=value",
        help="change a field of the config, such as model.d_model=128; llm-jax config shows every path",
    )
