"""`llm-jax eval` and `llm-jax generate`: their arguments, read before what takes seconds to import."""

import functools
from collections.abc import Sequence

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
        "wrong edit; and tasks of your own. Adds a line to RUN_DIR/eval.jsonl. docs/evaluation.md tells of it all.",
        "  llm-jax eval runs/quickstart\n"
        "  llm-jax eval runs/quickstart --step 500 --json\n"
        "  llm-jax eval runs/quickstart --tasks my_tasks/ --tasks other.yaml\n"
        "  llm-jax eval runs/quickstart --lm-eval blimp my_task.yaml --limit 100\n"
        "  llm-jax eval runs/quickstart eval.stride=32 mesh.tensor=4     more context for every token; on a mesh",
    )
    _add_run_directory(parser)
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="which held-out text (default: test)"
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
    from llm_jax.eval.evaluation import evaluate_checkpoint, until_stopped

    where = (arguments.run_dir, arguments.step, arguments.overrides)
    if arguments.lm_eval:
        from llm_jax.eval.lm_harness import evaluate_with_lm_eval

        harness = functools.partial(evaluate_with_lm_eval, *where, arguments.lm_eval, limit=arguments.limit)
        return until_stopped(lambda stop: harness(as_json=arguments.json, stop=stop))
    return until_stopped(
        lambda stop: evaluate_checkpoint(
            *where, split=arguments.split, as_json=arguments.json, tasks=arguments.tasks, stop=stop
        )
    )


def generate(argv: Sequence[str]) -> int:
    """The verb `generate`; returns its exit code. Raises Failure for what is foreseen."""
    with leaving_at_once():
        return _generate(argv)


def _generate(argv: Sequence[str]) -> int:
    parser = Parser(
        "generate",
        "Continues prompts with text from a checkpoint, printed as it comes. A seed gives the same text on every mesh.",
        '  llm-jax generate runs/quickstart --prompt "def main("\n'
        '  llm-jax generate runs/quickstart --prompt "import " --temperature 0 --max-tokens 50',
    )
    _add_run_directory(parser)
    parser.add_argument(
        "--prompt", action="append", help="the beginning; may be given several times (default: an empty one)"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="at most so many new tokens (128)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token each time (0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="everything random follows from it (0)")
    arguments = parser.read(argv)
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens {arguments.max_tokens}: must be at least 1")
    if not 0 <= arguments.temperature <= 100:
        raise ConfigError(f"--temperature {arguments.temperature:g}: must be from 0 to 100")
    if not 0 <= arguments.seed < 2**31:
        raise ConfigError(f"--seed {arguments.seed}: must be from 0 to {2**31 - 1}")
    prompts = arguments.prompt or [""]
    for prompt in prompts:
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise ConfigError(f"--prompt {prompt!a}: is not UTF-8")
    from llm_jax.eval.evaluation import generate_text, until_stopped
    from llm_jax.eval.sampling import Sampling

    sampling = Sampling(arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed)
    where = (arguments.run_dir, arguments.step, arguments.overrides)
    return until_stopped(lambda stop: generate_text(*where, prompts, sampling, stop))


def _add_run_directory(parser: Parser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's directory, such as runs/quickstart")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="path=value", help="change a field of eval or mesh, or data.dir"
    )
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest intact one)")
