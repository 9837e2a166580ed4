"""lm-evaluation-harness (EleutherAI) on a checkpoint: its tasks, its prompts and its metrics; our scores and texts."""

import contextlib
import difflib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from llm_jax.config import ConfigError
from llm_jax.data.errors import DataError
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.evaluation import append, as_text, now, opened, whole_batch
from llm_jax.eval.generate import Prompt
from llm_jax.eval.pseudo import make_masked_score
from llm_jax.eval.requests import Pair, pair_of
from llm_jax.eval.restore import Found, restore_weights
from llm_jax.eval.sampling import Sampling
from llm_jax.eval.scorer import make_score
from llm_jax.eval.served import Asker, Model, first_alone, served
from llm_jax.eval.tasks import likelihoods_of, pseudo_likelihoods_of
from llm_jax.guards import Stop, never
from llm_jax.objective.config import CausalConfig, MlmConfig
from llm_jax.run import Run
from llm_jax.run_directory import Refused

try:
    import lm_eval  # pyright: ignore[reportMissingImports]  an extra, here and below
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ConfigError(f"--lm-eval: {error.name} is not installed; python3 dev.py setup eval") from error

# Resamples of a standard error that has no formula.
BOOTSTRAPS = 1000
# What a task may say of how text is made, beside do_sample, until and max_gen_toks.
FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def evaluate_with_lm_eval(
    run_dir: str,
    step: int | None,
    overrides: Sequence[str],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    as_json: bool = False,
    stop: Stop = never,
) -> dict[str, Any] | None:
    """Runs tasks, the harness's own by name and others by a YAML file's path, on at most `limit` documents of each.

    Prints the figures, adds them to the run's eval.jsonl, and returns them on process 0; None elsewhere, and where it
    was stopped. Of a masked model likelihoods are pseudo-log-likelihoods. Needs the job's processes joined.
    Raises Refused for tasks that a masked model cannot do, ConfigError and DataError for those that cannot be loaded,
    all before any weight is read; and NotFinite.
    """
    with opened(run_dir, step, overrides) as (found, run, mesh):
        is_causal = isinstance(run.objective, CausalConfig)
        loaded = first_alone(lambda: load_tasks(tasks, causal=is_causal))
        model = served_model(found, run, mesh, stop)
        figures = served(model, lambda asker: harness_figures(asker, found.tokenizer, loaded, limit))
    if figures is None:
        return None
    result = {"step": found.step, "lm_eval": {"version": lm_eval.__version__, "limit": limit, "tasks": figures}}
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        show(run.name, result)
    append(Path(run_dir, "eval.jsonl"), result | {"time": now()})
    return result


def served_model(found: Found, run: Run, mesh: Mesh, stop: Stop) -> Model:
    """What answers the harness; its weights are read now."""
    weights, seq_len, rows = restore_weights(found, run.model, mesh), run.data.seq_len, whole_batch(run, mesh)
    match run.objective:
        case CausalConfig():
            likelihoods = likelihoods_of(make_score(run.model), weights, seq_len, rows, stop)
        case MlmConfig():
            score, words_V2 = make_masked_score(run.model), found.tokenizer.word_starts
            likelihoods = pseudo_likelihoods_of(score, weights, words_V2, seq_len, rows, stop)
    return Model(run.model, weights, found.tokenizer, likelihoods, seq_len, rows, stop)


def harness_figures(
    asker: Asker, tokenizer: Tokenizer, loaded: "Loaded | None", limit: int | None
) -> dict[str, dict[str, float | int | None]]:
    """The harness's figures of each task, as it names them: acc and acc_stderr, and samples; None for what is none."""
    assert loaded is not None, "process 0 has loaded the tasks"
    # Its processes would be forks of one that holds devices.
    os.environ["DISABLE_MULTIPROC"] = "1"
    # It talks on stdout, where the result belongs.
    with contextlib.redirect_stdout(sys.stderr):
        results: Any = simple_evaluate(
            model=Checkpoint(asker, tokenizer),
            tasks=loaded.tasks,
            task_manager=loaded.manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    told = {**results["results"], **results.get("groups", {})}
    return {task: _figures(figures) for task, figures in told.items()}


def _figures(figures: Mapping[str, Any]) -> dict[str, float | int | None]:
    kept: dict[str, float | int | None] = {"samples": figures.get("sample_len")}
    for key, value in figures.items():
        name, comma, chosen = key.partition(",")
        if comma:
            is_number = isinstance(value, int | float) and math.isfinite(value)
            kept[name if chosen == "none" else f"{name} ({chosen})"] = float(value) if is_number else None
    return kept


class Loaded(NamedTuple):
    """Tasks and groups, and what loaded them."""

    manager: TaskManager
    tasks: list[Any]


def load_tasks(specs: Sequence[str], *, causal: bool) -> Loaded:
    """The harness's tasks and groups by these names and paths.

    Raises ConfigError for what there is not, DataError, and Refused for what such a model cannot do.
    """
    with contextlib.redirect_stdout(sys.stderr):
        return _load_tasks(specs, causal)


def _load_tasks(specs: Sequence[str], causal: bool) -> Loaded:
    names = [spec for spec in specs if not spec.endswith((".yaml", ".yml"))]
    # Reading the harness's own 14,000 files takes ten seconds.
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "a file of your own ends in .yaml"
            raise ConfigError(f"--lm-eval {name}: lm-eval {lm_eval.__version__} has no such task; {hint}")
    loaded = []
    for spec in specs:
        task = spec if spec in names else read_task(Path(spec))
        try:
            found = manager.load([task])
        except Exception as error:  # a task is anybody's code, and may download
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"--lm-eval {spec}: the task cannot be loaded: {said}") from error
        if any(getattr(one, "UNSAFE_CODE", False) for one in found["tasks"].values()):
            raise ConfigError(f"--lm-eval {spec}: runs code that the model wrote, which llm-jax eval does not")
        for name, one in found["tasks"].items():
            if not causal and getattr(one, "OUTPUT_TYPE", None) == "generate_until":
                raise Refused(
                    f"--lm-eval {spec}: {name} has text generated, and a masked language model continues none"
                )
        groups = found.get("groups", {})
        group = task if isinstance(task, str) else task.get("group")
        loaded += [groups[group]] if group in groups else found["tasks"].values()
    return Loaded(manager, loaded)


def read_task(path: Path) -> dict[str, Any]:
    """A task's YAML, in which data_files and data_dir begin at the file's folder. Raises ConfigError and DataError."""
    if not path.is_file():
        raise ConfigError(f"--lm-eval {path}: no such file")
    try:
        task = load_yaml(path)
    except Exception as error:  # it may import a module beside it
        raise DataError(f"--lm-eval {path}: {' '.join(str(error).split())}") from error
    if not {"task", "group"} & task.keys():
        raise DataError(f"--lm-eval {path}: names neither a task nor a group")
    arguments = task.get("dataset_kwargs") or {}
    there = {name: _from(path.parent, arguments[name]) for name in ("data_files", "data_dir") if name in arguments}
    return task | {"dataset_kwargs": arguments | there} if there else task


def _from(folder: Path, files: Any) -> Any:
    """Paths as seen from a folder; addresses stay."""
    match files:
        case str():
            return files if "://" in files else str((folder / Path(files).expanduser()).absolute())
        case Mapping():
            return {name: _from(folder, of_split) for name, of_split in files.items()}
        case _:
            return [_from(folder, file) for file in files]


class Checkpoint(LM):
    """The harness's model. Every text is a document's beginning; its world is one process, whatever answers."""

    def __init__(self, asker: Asker, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._asker = asker
        self._tokenizer = tokenizer

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether it is what greedy decoding gives.

        As in the harness's own models, spaces at a context's end are asked for with the continuation.
        """
        pairs = [self._pair(*request.args) for request in requests]
        return [(answer.log_likelihood, answer.greedy) for answer in self._asker.likelihoods(pairs)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Nats of each text as a document, every token of it once; in the harness's windows, see requests.rolling."""
        pairs = [self._pair("", text) for (text,) in (request.args for request in requests)]
        return [answer.log_likelihood for answer in self._asker.likelihoods(pairs)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The continuation of each context up to the first of its stop strings; greedy unless it is to be sampled."""
        kinds: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for n, request in enumerate(requests):
            kinds.setdefault(sampling_of(request.args[1]), []).append(n)
        texts = [""] * len(requests)
        for (sampling, stops), chosen in kinds.items():
            # A repeated request draws anew: its row is its number.
            prompts = [Prompt(self._pair(requests[n].args[0], "").context, n) for n in chosen]
            for n, text in zip(chosen, self._asker.texts(prompts, sampling, stops), strict=True):
                texts[n] = text
        return texts

    def _pair(self, context: str, continuation: str) -> Pair:
        kept = context.rstrip() if continuation else context
        try:
            return pair_of(self._tokenizer, kept, context[len(kept) :] + continuation)
        except UnicodeEncodeError as error:
            raise DataError(f"a task's text is not UTF-8: {error}") from error


def sampling_of(said: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """How a task wants its text, and its stop strings. Raises DataError for what we have no word for."""
    wishes: dict[str, Any] = dict(normalize_gen_kwargs(dict(said)))
    stops, max_tokens, samples = (wishes.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    unknown = wishes.keys() - set(FILTERS)
    if unknown:
        there = ", ".join(("until", "max_gen_toks", "do_sample", *FILTERS))
        raise DataError(f"a task's generation_kwargs have {min(unknown)}; there are {there}")
    # Without a temperature, what the harness's other models take.
    chosen: dict[str, Any] = {"temperature": 1.0} | wishes if samples else {"temperature": 0.0}
    return Sampling(max_tokens, **chosen), tuple(stops)


def show(name: str, result: Mapping[str, Any]) -> None:
    """Prints a table of the figures."""
    told = result["lm_eval"]
    of = f", the first {told['limit']} documents of each" if told["limit"] else ""
    print(f"{name} after {result['step']} steps, by lm-eval {told['version']}{of}:")
    table = Table("task", "samples", "metric", "value", "standard error")
    for column in table.columns[1], *table.columns[3:]:
        column.justify = "right"
    for task, figures in told["tasks"].items():
        metrics = [metric for metric in figures if metric != "samples" and "_stderr" not in metric]
        for metric in metrics:
            name, space, chosen = metric.partition(" ")
            error = figures.get(f"{name}_stderr{space}{chosen}")
            first = (task, as_text(figures["samples"], ",")) if metric == metrics[0] else ("", "")
            table.add_row(*first, metric, as_text(figures[metric], ".4f"), as_text(error, ".4f"))
    Console().print(table)
