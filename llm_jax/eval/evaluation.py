"""What the verbs do: a checkpoint is found, put on this job's devices, and scored or sampled from."""

import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from llm_jax import exit_codes
from llm_jax.data.errors import DataError
from llm_jax.data.loader import open_rows
from llm_jax.data.prepare import Prepared, documents, open_prepared
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.distributed import join_processes
from llm_jax.eval.figures import figures
from llm_jax.eval.fill import in_brackets, make_fill
from llm_jax.eval.generate import make_decoder, prompt_of, streams
from llm_jax.eval.history import EVALUATIONS, ROLLBACKS, add, last_rollback, lines
from llm_jax.eval.perplexity import compressed, held_out_of, score_held_out, score_rows
from llm_jax.eval.pseudo import drawn_places, make_masked_score, masked_scores, pseudo_perplexity
from llm_jax.eval.restore import Found, adapt, find, for_decoding, mesh_of, restore_weights, row_parts
from llm_jax.eval.rows import make_ask, make_row_sums
from llm_jax.eval.sampling import Sampling
from llm_jax.eval.scorer import make_score
from llm_jax.eval.suite import make_suite
from llm_jax.eval.task_files import Read, read_tasks
from llm_jax.eval.task_scores import check
from llm_jax.eval.task_table import plus_minus, suite_table, task_table
from llm_jax.eval.tasks import (
    causal_model,
    likelihoods_before,
    likelihoods_of,
    masked_model,
    pseudo_likelihoods_of,
    score_tasks,
    suite_of,
)
from llm_jax.guards import AFTER_BATCH, Guards, Stop, never
from llm_jax.mesh import keep_compiled, told_slices
from llm_jax.model.backends import told
from llm_jax.model.transformer import Weights
from llm_jax.objective.config import CausalConfig, MlmConfig
from llm_jax.run import Run
from llm_jax.run_directory import Refused
from llm_jax.train.config import WatchdogConfig

# What an evaluation shows of the model's text: a held-out document's beginning, continued.
PROMPT_CHARACTERS = 80
SAMPLING = Sampling(max_tokens=128, temperature=0.8, seed=0)


# The model's text as eval.jsonl and the report have it: prompt and text, or what `fill` makes as filled.
Sample = dict[str, Any]

# Weights -> the figures and a sample; None where it was stopped.
Evaluate = Callable[[Weights], tuple[dict[str, Any], Sample] | None]


class Opened(NamedTuple):
    """A checkpoint on this job's devices; the run's mesh and attention are settled for them."""

    found: Found
    run: Run
    mesh: Mesh


class ResultError(exit_codes.Failure):
    """The result cannot be written down."""

    exit_code = exit_codes.CHECKPOINT


def until_stopped(work: Callable[[Stop], object]) -> int:
    """Joins the job's processes and does the work; returns the exit code, which a signal decides that stopped it."""
    keep_compiled()
    watchdog = WatchdogConfig()
    join_processes(watchdog.heartbeat_s, watchdog.join_s)
    with Guards(AFTER_BATCH) as guards:
        work(guards.stop)
    if not guards.stopped:
        return exit_codes.DONE
    print("stopped before the end", file=sys.stderr)
    return guards.exit_code


def evaluate_checkpoint(
    run_dir: str,
    step: int | None,
    overrides: Sequence[str],
    *,
    split: str,
    as_json: bool,
    tasks: Sequence[str] = (),
    stop: Stop = never,
) -> dict[str, Any] | None:
    """Scores held-out text and tasks, prints the result, and adds it to the run's eval.jsonl; returns it.

    tasks: YAML files, and folders of some.

    stop is asked before each batch, and must answer alike on all processes; stopped, it writes nothing and returns
    None. Needs the job's processes joined.
    """
    reads = read_tasks(tasks)
    rolled_back = last_rollback(lines(Path(run_dir, ROLLBACKS)))
    with opened(run_dir, step, overrides) as (found, run, mesh):
        evaluate = make_evaluation(found, run, mesh, split, reads, stop)
        scored = evaluate(restore_weights(found, run.model, mesh))
    if scored is None:
        return None
    result, sample = {"step": found.step, **scored[0]}, scored[1]
    if jax.process_index() == 0:
        if as_json:
            print(json.dumps(result), flush=True)
        else:
            show(run.name, result, sample)
        append(Path(run_dir, EVALUATIONS), result | {"time": now(), "sample": sample, "rolled_back": rolled_back})
    return result


def make_evaluation(found: Found, run: Run, mesh: Mesh, split: str, reads: Sequence[Read], stop: Stop) -> Evaluate:
    """What evaluates weights of this run, compiled once; the mesh is set, here and whenever it is called.

    Raises Refused for tasks of another kind of model, DataError where the data is not there, or another one.
    """
    prepared = same_data(found, run)
    match run.objective:
        case CausalConfig():
            check(reads, causal=True)
            evaluate = make_text_evaluation(found, run, mesh, prepared, split, reads, stop)
        case MlmConfig():
            check(reads, causal=False)
            evaluate = make_masked_evaluation(found, run, mesh, prepared, split, reads, stop)
    seen = prepared.text_info["leaked_share"] if split == "test" else None

    def with_leak(weights: Weights) -> tuple[dict[str, Any], Sample] | None:
        scored = evaluate(weights)
        return None if scored is None else ({**scored[0], "seen_long_lines": seen}, scored[1])

    return with_leak


def make_text_evaluation(
    found: Found, run: Run, mesh: Mesh, prepared: Prepared, split: str, reads: Sequence[Read], stop: Stop
) -> Evaluate:
    """Every byte of the split once, in windows, beside compressors; the suite, tasks, and a beginning continued."""
    texts = list(documents(prepared, split))
    held_out = held_out_of(texts, found.tokenizer)
    if not any(document.text for document in held_out):
        raise DataError(f"the {split} split has no text; raise data.{split}_share, or give more text")
    stride = run.eval.stride or run.data.seq_len // 2
    seq_len, batch_rows = run.data.seq_len, whole_batch(run, mesh)
    score, piece_bytes = make_score(run.model), found.tokenizer.piece_bytes
    suite = make_suite(texts, found.tokenizer, seq_len, run.seed)
    before = likelihoods_before(lambda weights: likelihoods_of(score, weights, seq_len, batch_rows, stop), run)
    beside = compressed(held_out)

    def evaluate(weights: Weights) -> tuple[dict[str, Any], Sample] | None:
        sums = score_held_out(
            score, weights, held_out, piece_bytes, seq_len=seq_len, stride=stride, batch_rows=batch_rows, stop=stop
        )
        if sums is None:
            return None
        model = causal_model(score, weights, run, found.tokenizer, stride=stride, batch_rows=batch_rows, stop=stop)
        kinds = suite_of(suite, model.likelihoods, before, causal=True)
        if kinds is None:
            return None
        tasks = score_tasks(reads, model)
        if tasks is None:
            return None
        sample = beginning_continued(weights, run, found.tokenizer, held_out[0].text, stop)
        if sample is None:
            return None
        told = {**figures(sums), **beside, "split": split, "stride": stride}
        return {**told, "pseudo_perplexity": None, "suite": kinds, "tasks": tasks}, sample

    return evaluate


def make_masked_evaluation(
    found: Found, run: Run, mesh: Mesh, prepared: Prepared, split: str, reads: Sequence[Read], stop: Stop
) -> Evaluate:
    """Every row of the split once, with masks that are always the same; what else there is to tell; a row filled in.

    The names are those of causal models, null where a masked model has no such figure.
    """
    rows = open_rows(prepared, split)
    batch_rows = whole_batch(run, mesh)
    crosses = run.data.cross_documents
    ask = make_ask(run.objective, found.tokenizer.word_starts, seed=run.seed, cross_documents=crosses)
    row_sums = make_row_sums(run.model, run.objective, ask, rows, found.tokenizer.piece_bytes, batch_rows)
    fill = make_fill(run.model, ask, rows, found.tokenizer)
    texts = list(documents(prepared, split))
    by_single_masks = make_single_masks(found.tokenizer, run, texts, batch_rows, reads, stop)

    def evaluate(weights: Weights) -> tuple[dict[str, Any], Sample] | None:
        sums = score_rows(row_sums, weights, len(rows), batch_rows, stop)
        if sums is None:
            return None
        single = by_single_masks(weights)
        if single is None:
            return None
        nothing = dict.fromkeys(("zlib_bits_per_byte", "lzma_bits_per_byte"))
        told = {**figures(sums, masked=True), **nothing, "split": split, "stride": None}
        return {**told, **single}, {"filled": fill(weights)}

    return evaluate


def make_single_masks(
    tokenizer: Tokenizer,
    run: Run,
    texts: Sequence[tuple[str, str]],
    batch_rows: int,
    reads: Sequence[Read],
    stop: Stop,
) -> Callable[[Weights], dict[str, Any] | None]:
    """A masked model's pseudo_perplexity, suite and tasks; texts: (name, text) each. None where it was stopped."""
    score, words_V2 = make_masked_score(run.model), tokenizer.word_starts
    seq_len = run.data.seq_len
    drawn = drawn_places(held_out_of(texts, tokenizer), run.eval.pseudo_tokens, run.seed)
    suite = make_suite(texts, tokenizer, seq_len, run.seed, masked=True)
    before = likelihoods_before(
        lambda weights: pseudo_likelihoods_of(score, weights, words_V2, seq_len, batch_rows, stop), run
    )

    def evaluate(weights: Weights) -> dict[str, Any] | None:
        pseudo: dict[str, Any] = {"tokens": sum(len(text.places) for text in drawn)}
        for name, words in (("original", None), ("within_word_l2r", words_V2)):
            told = masked_scores(score, weights, drawn, words, seq_len=seq_len, batch_rows=batch_rows, stop=stop)
            if told is None:
                return None
            pseudo[name] = pseudo_perplexity(told)
        model = masked_model(score, weights, run, tokenizer, batch_rows=batch_rows, stop=stop)
        kinds = suite_of(suite, model.likelihoods, before, causal=False)
        if kinds is None:
            return None
        tasks = score_tasks(reads, model)
        return None if tasks is None else {"pseudo_perplexity": pseudo, "suite": kinds, "tasks": tasks}

    return evaluate


def whole_batch(run: Run, mesh: Mesh) -> int:
    """eval.batch_rows, rounded up to what the mesh divides."""
    return -(-run.eval.batch_rows // row_parts(mesh)) * row_parts(mesh)


@contextmanager
def opened(
    run_dir: str, step: int | None, overrides: Sequence[str], *, continues: bool = False, fills: bool = False
) -> Iterator[Opened]:
    """Finds the checkpoint, and sets the mesh for as long as it is open.

    Raises Refused where it has to continue text, or to fill masks, and was not trained to.
    """
    found = find(run_dir, step)
    if continues and not isinstance(found.run.objective, CausalConfig):
        raise Refused(
            f"{run_dir} is a masked language model, which continues no text; llm-jax eval {run_dir} scores it"
        )
    if fills and not isinstance(found.run.objective, MlmConfig):
        raise Refused(
            f"{run_dir} is a causal language model, which fills no masks; llm-jax generate {run_dir} continues text"
        )
    run, sizes = adapt(found.run, overrides, jax.device_count(), jax.default_backend())
    mesh = mesh_of(sizes, run.mesh.slices)
    axes = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    axes += told_slices(mesh, run.mesh.slices)
    if jax.process_index() == 0:
        backends = [f"{name.replace('_', ' ')} {choice}" for name, choice in told(run.model).items()]
        print(f"checkpoint {found.step} of {run_dir} on {axes}, {', '.join(backends)}", file=sys.stderr)
    with jax.set_mesh(mesh):
        yield Opened(found, run, mesh)


def same_data(found: Found, run: Run) -> Prepared:
    """The data that the run was trained and is evaluated on. Raises DataError where it is not there, or another one."""
    prepared = open_prepared(run.data, run.tokenizer, run.model.vocab_size, run.seed)
    if prepared.fingerprint != found.data_fingerprint:
        raise DataError(
            f"the text prepared below {run.data.dir} is not what {found.directory} was trained on, so what is held out "
            "may have been trained on; point data.dir to the data of that run"
        )
    return prepared


def beginning_continued(weights: Weights, run: Run, tokenizer: Tokenizer, start: str, stop: Stop) -> Sample | None:
    """A document's beginning and the model's continuation of it; None where it was stopped."""
    prompt = start[:PROMPT_CHARACTERS]
    texts: list[str] = []
    with for_decoding(weights, run.model) as (weights, cfg):
        decoder = make_decoder(cfg, run.data.seq_len, SAMPLING)
        for (text,) in streams(decoder, weights, tokenizer, [prompt_of(tokenizer, prompt)]):
            if stop():
                return None
            texts.append(text)
    return {"prompt": prompt, "text": "".join(texts)}


def show(name: str, result: Mapping[str, Any], text: Sample) -> None:
    """Prints a table of the result, and the sample."""
    masked = "filled" in text
    what, guessed = ("masked token", "masked-token") if masked else ("token", "next-token")
    print(f"{name} after {result['step']} steps, on held-out {result['split']} text:")
    table = Table("", "", show_header=False)
    table.columns[1].justify = "right"
    if not masked:
        table.add_row("bits per byte", f"{result['bits_per_byte']:.3f}")
        table.add_row("  of zlib -9", f"{result['zlib_bits_per_byte']:.3f}")
        table.add_row("  of lzma", f"{result['lzma_bits_per_byte']:.3f}")
    table.add_row(f"loss (nats per {what})", as_text(result["loss"], ".4f"))
    table.add_row("perplexity", "overflow" if result["perplexity"] is None else f"{result['perplexity']:.4g}")
    table.add_row(f"{guessed} accuracy", as_text(result["accuracy"], ".1%"))
    if masked:
        add_pseudo_perplexity(table, result["pseudo_perplexity"])
    table.add_row(f"{what}s, each scored once", f"{result['tokens']:,}")
    table.add_row("bytes they stand for", f"{result['bytes']:,}")
    if not masked:
        table.add_row("windows move on by", f"{result['stride']} tokens")
    if result["seen_long_lines"] is not None:
        table.add_row("its long lines that training saw", f"{result['seen_long_lines']:.1%}")
    Console().print(table)
    show_tasks(result)
    if masked:
        print("\na held-out row, its hidden tokens as [first guess], or as [first guess|what was there]:\n")
        print(in_brackets(text["filled"]), flush=True)
    else:
        print(f"\na sample, after the first {len(text['prompt'])} characters of a held-out document:\n")
        print(text["prompt"] + text["text"], flush=True)


def add_pseudo_perplexity(table: Table, told: Mapping[str, Any]) -> None:
    """Rows of a masked model's pseudo-perplexities, and of how many tokens they are."""
    for name, of in (("original", ""), ("within_word_l2r", ", later tokens of the word hidden too")):
        figure = told[name]
        table.add_row(f"pseudo-perplexity{of}", "\N{EN DASH}" if figure is None else plus_minus(figure))
    table.add_row("  of tokens drawn", f"{told['tokens']:,}")


def show_tasks(result: Mapping[str, Any]) -> None:
    """Prints tables of the default suite and of the tasks, where there are any."""
    suite = result["suite"]
    if suite is not None and not suite["kinds"] and not suite["left_out"]:
        print("\nno default suite: it is made of held-out Python, and no document here is a .py file that parses")
    elif suite is not None:
        print("\nheld-out Python, and the same with one wrong edit: how often the original is likelier")
        if suite["kinds"]:
            Console().print(suite_table(suite))
        for kind, why in suite["left_out"].items():
            print(f"{kind} is left out: {why}")
    if result["tasks"]:
        print()
        Console().print(task_table(result["tasks"]))


def as_text(value: float | None, form: str) -> str:
    """A figure as text; a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value:{form}}"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line of JSON to a file. Raises ResultError where it cannot be written."""
    try:
        add(path, record)
    except OSError as error:
        raise ResultError(f"the result cannot be added to {path}: {error.strerror}") from error


def now() -> str:
    """The time as ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(text: str) -> None:
    """Process 0 writes for all, at once."""
    if jax.process_index() == 0:
        print(text, end="", flush=True)
