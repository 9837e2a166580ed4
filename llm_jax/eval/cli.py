"""`llm-jax eval`, `generate` and `fill-mask`: their arguments, read before what takes seconds to import."""

import argparse
import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_jax.command_line import Parser
from llm_jax.config import ConfigError
from llm_jax.early_signals import leaving_at_once


def evaluate(argv: Sequence[str]) -> int:
    """The verb `eval`; returns its exit code. Raises Failure for what is foreseen."""
    with leaving_at_once():
        return _evaluate(argv)


def _evaluate(argv: Sequence[str]) -> int:
    parser = Parser(
        "eval",
        "Scores a checkpoint on held-out text: loss, perplexity, bits per byte (every byte scored once) and\n"
        "next-token accuracy, beside zlib -9 and lzma on the same bytes; held-out Python against the same with one\n"
        "wrong edit; and tasks of your own. Of a masked model: loss and accuracy under masks that stay the same, and\n"
        "pseudo-log-likelihoods for the rest. Adds a line to RUN_DIR/eval.jsonl; docs/evaluation.md tells of it all.",
        "  llm-jax eval runs/quickstart\n"
        "  llm-jax eval runs/quickstart --step 500 --json\n"
        "  llm-jax eval runs/quickstart --tasks my_tasks/ --tasks other.yaml\n"
        "  llm-jax eval runs/quickstart --watch                          beside a training run: every checkpoint\n"
        "  llm-jax eval runs/quickstart --lm-eval blimp my_task.yaml --limit 100\n"
        "  llm-jax eval runs/quickstart eval.stride=32 mesh.tensor=4     more context for every token; on a mesh",
    )
    _add_run_directory(parser)
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        help="which held-out text (default: test; with --watch, which chooses by it, validation)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="evaluate every checkpoint as it comes, once, and mark the best; ends after the run's last",
    )
    parser.add_argument(
        "--tasks",
        action="append",
        default=[],
        metavar="PATH",
        help="a task's YAML file, or a folder of some; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="run lm-evaluation-harness instead, on tasks of its own by name, and on others by a YAML file's path",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --lm-eval: the first N documents of each task")
    arguments = parser.read(argv)
    if arguments.limit is not None and (arguments.limit < 1 or not arguments.lm_eval):
        raise ConfigError(f"--limit {arguments.limit}: must be at least 1, and goes with --lm-eval")
    if arguments.watch:
        return _watch(arguments)
    from llm_jax.eval.evaluation import evaluate_checkpoint, until_stopped

    where = (arguments.run_dir, arguments.step, arguments.overrides)
    if arguments.lm_eval:
        from llm_jax.eval.lm_harness import evaluate_with_lm_eval

        harness = functools.partial(evaluate_with_lm_eval, *where, arguments.lm_eval, limit=arguments.limit)
        return until_stopped(lambda stop: harness(as_json=arguments.json, stop=stop))
    return until_stopped(
        lambda stop: evaluate_checkpoint(
            *where, split=arguments.split or "test", as_json=arguments.json, tasks=arguments.tasks, stop=stop
        )
    )


def _watch(arguments: argparse.Namespace) -> int:
    if arguments.step is not None or arguments.lm_eval:
        other = f"--step {arguments.step}" if arguments.step is not None else "--lm-eval"
        raise ConfigError(f"{other}: nothing to do with --watch, which evaluates every checkpoint as it comes")
    from llm_jax.eval.evaluation import until_stopped
    from llm_jax.eval.watch import watch

    asked = functools.partial(watch, arguments.run_dir, arguments.overrides, as_json=arguments.json)
    split = arguments.split or "validation"
    return until_stopped(lambda stop: asked(split=split, tasks=arguments.tasks, stop=stop))


def generate(argv: Sequence[str]) -> int:
    """The verb `generate`; returns its exit code. Raises Failure for what is foreseen."""
    with leaving_at_once():
        return _generate(argv)


def _generate(argv: Sequence[str]) -> int:
    parser = Parser(
        "generate",
        "Continues prompts with text from a checkpoint: one as it comes, several each when it is ready, in order.\n"
        "A seed gives the same text on every mesh, whatever shares a batch (eval.batch_rows).",
        '  llm-jax generate runs/quickstart --prompt "def main("\n'
        '  llm-jax generate runs/quickstart --prompt "import " --temperature 0 --max-tokens 50 --stop "\\n\\n"\n'
        "  llm-jax generate runs/quickstart --prompts prompts.txt --samples 4 --top-p 0.9 --json > texts.jsonl\n"
        '  llm-jax generate runs/quickstart --prompt "class " --beams 4',
    )
    _add_run_directory(parser)
    _add_generate_arguments(parser)
    arguments = parser.read(argv)
    if arguments.prompt and arguments.prompts:
        raise ConfigError("--prompt and --prompts: give one of the two")
    asked = {name: value for name in DRAWING if (value := getattr(arguments, name)) is not None}
    _check_generate(arguments, asked)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else arguments.prompt or [""]
    for prompt in prompts:
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise ConfigError(f"--prompt {prompt!a}: is not UTF-8")
    stops = [_unescaped(stop) for stop in arguments.stop]
    from llm_jax.eval.beam import Searching
    from llm_jax.eval.evaluation import until_stopped
    from llm_jax.eval.generation import Asked, generate_text
    from llm_jax.eval.sampling import Sampling

    if arguments.beams is None:
        how = Sampling(arguments.max_tokens, **asked)
    else:
        how = Searching(arguments.beams, arguments.length_penalty, arguments.max_tokens)
    from_stdin = arguments.prompts == "-"
    request = Asked(prompts, how, arguments.samples, stops, arguments.json, from_stdin)
    where = (arguments.run_dir, arguments.step, arguments.overrides)
    return until_stopped(lambda stop: generate_text(*where, request, stop))


def fill_mask(argv: Sequence[str]) -> int:
    """The verb `fill-mask`; returns its exit code. Raises Failure for what is foreseen."""
    with leaving_at_once():
        return _fill_mask(argv)


def _fill_mask(argv: Sequence[str]) -> int:
    parser = Parser(
        "fill-mask",
        "Tells which pieces a masked language model finds likeliest at each [MASK] of a text, with probabilities, and\n"
        "the text filled with the first ones. A mask is one piece of the tokenizer. Several masks are each filled for\n"
        "themselves, the others being hidden too: the first ones need not fit each other. A space before a mask is\n"
        "part of what is asked for, since pieces bring their space; spaces that indent a line are not.",
        '  llm-jax fill-mask runs/tiny_mlm --text "def [MASK](self):"\n'
        '  llm-jax fill-mask runs/tiny_mlm --text "for [MASK] in [MASK](10):" --top 3\n'
        "  llm-jax fill-mask runs/tiny_mlm --texts texts.txt --json > filled.jsonl",
    )
    _add_run_directory(parser)
    parser.add_argument("--text", action="append", help="a text with [MASK] in it; may be given several times")
    parser.add_argument(
        "--texts",
        metavar="FILE",
        help='a text in each line that is not empty, or a "text" in each of a .jsonl file; - is standard input',
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="pieces told for each mask (5)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each text")
    arguments = parser.read(argv)
    if bool(arguments.text) == bool(arguments.texts):
        raise ConfigError("--text and --texts: give one of the two")
    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top}: must be at least 1")
    texts = arguments.text or read_prompts(arguments.texts, "text")
    for text in texts:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ConfigError(f"--text {text!a}: is not UTF-8")
    from llm_jax.eval.evaluation import until_stopped
    from llm_jax.eval.fill_mask import Asked, fill_mask

    request = Asked(texts, arguments.top, arguments.json, arguments.texts == "-")
    where = (arguments.run_dir, arguments.step, arguments.overrides)
    return until_stopped(lambda stop: fill_mask(*where, request, stop))


# Options that say how a token is drawn; a search draws none.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _add_generate_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--prompt", action="append", help="the beginning; may be given several times (default: an empty one)")
    add(
        "--prompts",
        metavar="FILE",
        help='a prompt in each line that is not empty, or a "prompt" in each of a .jsonl file; - is standard input',
    )
    add("--max-tokens", type=int, default=128, metavar="N", help="at most so many new tokens (128)")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time (0.8)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that have probability P together")
    add("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="above 1, what is there already becomes less likely")
    add("--seed", type=int, metavar="S", help="everything random follows from it (0)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="end before it (\\n is a newline); may be given several times",
    )
    add("--samples", type=int, default=1, metavar="N", help="texts of each prompt; with --beams the N best (1)")
    add("--beams", type=int, metavar="K", help="search for likely texts, K at a time, instead of drawing")
    add("--length-penalty", type=float, default=0.6, metavar="A", help="with --beams: above 0 favours long texts (0.6)")
    add("--json", action="store_true", help="print a line of JSON for each text, with ids and log-likelihood")


def _check_generate(arguments: argparse.Namespace, asked: Mapping[str, float]) -> None:
    """Raises ConfigError for what no text can be made with."""
    for name, lowest, highest in (
        ("max_tokens", 1, math.inf),
        ("temperature", 0, 100),
        ("top_k", 1, math.inf),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("repetition_penalty", 0, 100),
        ("seed", 0, 2**31 - 1),
        ("samples", 1, math.inf),
        ("beams", 1, math.inf),
        ("length_penalty", 0, 10),
    ):
        value = getattr(arguments, name)
        above = name in ("top_p", "min_p", "repetition_penalty")
        if value is None or (lowest < value <= highest or (value == lowest and not above)):
            continue
        if highest == math.inf:
            must = f"at least {lowest}"
        else:
            must = f"above {lowest}, up to {highest}" if above else f"from {lowest} to {highest}"
        told = f"{value:g}" if isinstance(value, float) else value
        raise ConfigError(f"--{name.replace('_', '-')} {told}: must be {must}")
    if "" in arguments.stop:
        raise ConfigError("--stop '': must not be empty")
    if arguments.beams is not None:
        drawn = ["--" + name.replace("_", "-") for name in asked] + ["--stop"] * bool(arguments.stop)
        if drawn:
            raise ConfigError(f"{', '.join(drawn)}: nothing to do with --beams, which compares whole likely texts")
        if arguments.samples > arguments.beams:
            raise ConfigError(f"--samples {arguments.samples}: --beams {arguments.beams} finds no more than that many")


def read_prompts(path: str, what: str = "prompt") -> list[str]:
    """The prompts of a file: a line each, or "prompt" in each line of a .jsonl file; of standard input for -.

    what: "prompt", or what else is read so; the option is its plural. Raises ConfigError where it cannot be read or has
    none.
    """
    option = f"--{what}s {path}"
    try:
        text = sys.stdin.buffer.read().decode() if path == "-" else Path(path).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{option}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: is not UTF-8 at byte {error.start}") from None
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), start=1)]
    lines = [(n, line) for n, line in lines if line]
    prompts = (
        [_prompt_of(line, f"{option}, line {n}", what) for n, line in lines]
        if path.endswith(".jsonl")
        else [line for _, line in lines]
    )
    if not prompts:
        raise ConfigError(f"{option}: there is no {what} in it")
    return prompts


def _unescaped(stop: str) -> str:
    try:
        return stop.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        raise ConfigError(f"--stop {stop!r}: is no escape that Python knows; a backslash is \\\\") from None


def _prompt_of(line: str, whose: str, what: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise ConfigError(f"{whose}: is not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get(what), str):
        raise ConfigError(f'{whose}: has no "{what}" that is text')
    return record[what]


def _add_run_directory(parser: Parser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's directory, such as runs/quickstart")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="path=value", help="change a field of eval or mesh, or data.dir"
    )
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest intact one)")
