"""`llm-jax eval` and `llm-jax generate` on a run directory made by hand: what they say, and what they refuse."""

import contextlib
import dataclasses
import hashlib
import io
import json
import lzma
import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llm_jax.__main__ import main
from llm_jax.checkpoint import CheckpointError, Checkpoints
from llm_jax.config import ConfigError, tree
from llm_jax.data.config import BOS_ID, EOS_ID, DataConfig, FilesSource
from llm_jax.data.errors import DataError
from llm_jax.data.prepare import Prepared, documents, prepare
from llm_jax.eval import cli as cli_module
from llm_jax.eval import evaluation
from llm_jax.eval.beam import Searching
from llm_jax.eval.config import EvalConfig
from llm_jax.eval.evaluation import ResultError, evaluate_checkpoint, opened, whole_batch
from llm_jax.eval.fill_mask import Asked as FillAsked
from llm_jax.eval.fill_mask import fill_mask
from llm_jax.eval.generation import Asked, generate_text
from llm_jax.eval.requests import Pair, log_likelihoods
from llm_jax.eval.restore import adapt, default_mesh, find, restore_weights
from llm_jax.eval.sampling import Sampling
from llm_jax.eval.scorer import make_score
from llm_jax.mesh import make_mesh
from llm_jax.model.config import ModelConfig
from llm_jax.model.paths import to_tree
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run, check
from llm_jax.run_directory import Refused
from llm_jax.train.config import MeshConfig
from llm_jax.train.start import checkpoint_meta
from llm_jax.train.state import TrainState, init_state
from tests.conftest import Cli, LaunchProcesses, Start
from tests.small import mesh_of

MODEL = ModelConfig(d_model=16, d_ff=32, n_layers=2, n_heads=8, n_kv_heads=4, d_head=4, vocab_size=320)
NAMES = ("step", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes")
REST = ("split", "stride", "pseudo_perplexity", "suite", "tasks", "seen_long_lines")
# One way of drawing and one of searching, so that their programs are compiled once.
SHORT = Sampling(max_tokens=20, temperature=1.0, seed=0)
SEARCH = Searching(beams=3, length_penalty=0.6, max_tokens=20)
# The quickest; and a mesh that divides rows, positions and heads.
ALONE = "mesh.data=1"
DIVIDED = (ALONE, "mesh.context=2", "mesh.tensor=2", "model.attention=xla")


class Made(NamedTuple):
    """A run directory with checkpoints 10 and 20, as training leaves it."""

    run_dir: Path
    run: Run
    prepared: Prepared


def write_texts(folder: Path) -> None:
    """Fifty files of a few lines of invented words, and a longer one."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    folder.mkdir()
    for n in range(50):
        n_lines = 200 if n == 7 else draw.randint(1, 25)
        lines = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(n_lines)]
        lines[0] += draw.choice(("", " \u00e9\u20ac"))
        (folder / f"{n:02}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def text_source(root: Path) -> DataConfig:
    """What write_texts has written, a fifth of it held out of training twice over."""
    source = FilesSource(paths=(str(root / "texts"),))
    return DataConfig(source=source, seq_len=32, dir=str(root / "data"), validation_share=0.2, test_share=0.2)


def save(run_dir: Path, step: int, state: TrainState, meta: dict) -> None:
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=9)
    checkpoints.save(step, jax.jit(to_tree)(state), meta, wait=True)
    checkpoints.close()


@jax.jit
def first_state(seed: int) -> TrainState:
    return init_state(MODEL, AdamWConfig(), seed)


@pytest.fixture(scope="module", autouse=True)
def short_sample() -> Iterator[None]:
    """A sample of an evaluation is drawn as the other texts here are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SAMPLING", SHORT)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    write_texts(root / "texts")
    run_dir = root / "run"
    data = text_source(root)
    # No mesh of any machine: training's is not evaluation's.
    run = Run(name="made", run_dir=str(run_dir), model=MODEL, data=data, mesh=MeshConfig(data=64, fsdp=2))
    prepared = prepare(data, run.tokenizer, MODEL.vocab_size, run.seed, report=lambda line: None)
    meta = checkpoint_meta(run, prepared, {})
    with jax.set_mesh(mesh_of(fsdp=8)):
        for step in (10, 20):
            save(run_dir, step, first_state(step), meta)
    (run_dir / "tokenizer.model").write_bytes(prepared.tokenizer.model)
    return Made(run_dir, run, prepared)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The run directory, to be damaged."""
    return Path(shutil.copytree(made.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("eval.jsonl")))


def evaluate(
    run_dir: Path, *overrides: str, step: int | None = None, split="test", as_json=True, tasks: Sequence[str] = ()
) -> dict:
    return evaluate_checkpoint(str(run_dir), step, overrides, split=split, as_json=as_json, tasks=tasks)


def meta_of(run_dir: Path) -> dict:
    with_reader = Checkpoints(run_dir / "checkpoints", read_only=True)
    meta = with_reader.meta(20)
    with_reader.close()
    return meta


def raw_text(made: Made, split: str) -> bytes:
    return b"".join(text.encode() for _, text in sorted(documents(made.prepared, split)))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_json_is_one_object_with_every_byte_of_the_held_out_text(made, split, capsys):
    evaluate(made.run_dir, ALONE, split=split)
    out, err = capsys.readouterr()
    told = json.loads(out)
    raw = raw_text(made, split)
    assert tuple(told) == (*NAMES, "zlib_bits_per_byte", "lzma_bits_per_byte", *REST)
    assert told["step"] == 20 and told["split"] == split and told["stride"] == 16
    assert told["bytes"] == len(raw) == made.prepared.text_info["splits"][split]["bytes"] > 1000
    assert told["zlib_bits_per_byte"] == 8 * len(zlib.compress(raw, 9)) / len(raw)
    assert told["lzma_bits_per_byte"] == 8 * len(lzma.compress(raw, preset=9)) / len(raw)
    assert told["bits_per_byte"] == pytest.approx(told["loss"] * told["tokens"] / np.log(2) / len(raw))
    assert told["perplexity"] == pytest.approx(np.exp(told["loss"]))
    assert told["seen_long_lines"] == (made.prepared.text_info["leaked_share"] if split == "test" else None)
    assert err.splitlines() == [
        "the mesh takes 1 of 8 devices",
        f"checkpoint 20 of {made.run_dir} on one device, attention chunked, compute dtype float32",
    ]


def test_without_a_word_on_the_mesh_all_devices_divide_the_weights(made, capsys):
    with opened(str(made.run_dir), None, []) as (_, _, mesh):
        assert mesh.shape["fsdp"] == mesh.size == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"checkpoint 20 of {made.run_dir} on fsdp 8, attention chunked, compute dtype float32"


def test_the_table_and_a_sample_are_for_people_and_a_line_is_for_the_report(copy, capsys):
    result = evaluate(copy, ALONE, as_json=False, step=10)
    out = capsys.readouterr().out
    (record,) = map(json.loads, (copy / "eval.jsonl").read_text().splitlines())
    assert {name: record[name] for name in result} == result and result["step"] == 10
    assert record.keys() - result.keys() == {"time", "sample", "rolled_back"} and record["time"].endswith("+00:00")
    assert "made after 10 steps, on held-out test text" in out
    for value in (f"{result['bits_per_byte']:.3f}", f"{result['loss']:.4f}", f"{result['bytes']:,}"):
        assert value in out
    assert record["sample"]["prompt"] + record["sample"]["text"] in out
    evaluate(copy, ALONE, as_json=False)
    assert [json.loads(line)["step"] for line in (copy / "eval.jsonl").read_text().splitlines()] == [10, 20]


TASKS: dict[str, tuple[str, list[dict[str, object]]]] = {
    "bytes": ("kind: bits_per_byte", [{"text": "abc def " * 9}, {"text": "x"}]),
    "choice": ("kind: multiple_choice", [{"question": "abc", "choices": ["de", "fg"], "answer": 1}]),
    "last": ("kind: cloze", [{"text": "abc def abc"}]),
    "pairs": ("kind: minimal_pairs", [{"sentence_good": "abc", "sentence_bad": "bac"}] * 3),
    "said": ("kind: generation\nmax_tokens: 4", [{"prompt": "abc", "answer": "no"}, {"prompt": "a", "answer": "no"}]),
    "sure": ("kind: calibration", [{"question": "abc", "choices": ["de", "fg"], "answer": 0}]),
}


def write_tasks(folder: Path) -> Path:
    """A task of every kind that a causal model can do."""
    folder.mkdir()
    for name, (text, records) in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"data: {name}.jsonl\n{text}\n")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


class Scored(NamedTuple):
    """What an evaluation of the newest checkpoint on one device has left: with tasks, in batches of 3 rows."""

    tasks: Path
    result: dict
    out: str
    err: str
    record: dict


@pytest.fixture(scope="module")
def scored(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = write_tasks(tmp_path_factory.mktemp("scored") / "tasks")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        result = evaluate(made.run_dir, ALONE, "eval.batch_rows=3", as_json=False, tasks=[str(folder)])
    record = json.loads((made.run_dir / "eval.jsonl").read_text().splitlines()[-1])
    return Scored(folder, result, out.getvalue(), err.getvalue(), record)


def test_tasks_of_one_s_own_are_in_the_table_in_the_json_and_in_the_record(scored):
    result, out = scored.result, scored.out
    assert list(result["tasks"]) == list(TASKS)
    assert "no default suite: it is made of held-out Python" in out and result["suite"]["kinds"] == {}
    for name, told in result["tasks"].items():
        assert name in out and told["n"] == len(TASKS[name][1])
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in told["metrics"].values())
    assert scored.record["tasks"] == result["tasks"]
    assert result["tasks"]["said"]["metrics"]["exact_match"]["value"] == 0


def test_a_task_s_mistake_is_told_before_anything_is_scored(copy, tasks):
    (tasks / "pairs.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"pairs\.jsonl, line 1: sentence_good: missing; must be text"):
        evaluate_checkpoint("nowhere", None, (), split="test", as_json=True, tasks=[str(tasks)])
    (tasks / "last.yaml").write_text("kind: crows_pairs\ndata: stereo.jsonl")
    (tasks / "stereo.jsonl").write_text('{"sent_more": "a", "sent_less": "b"}')
    with pytest.raises(Refused, match=r"^last: crows_pairs is the paper's metric, which needs a masked"):
        evaluate_checkpoint(str(copy), None, (), split="test", as_json=True, tasks=[str(tasks / "last.yaml")])
    assert not (copy / "eval.jsonl").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((*DIVIDED, "eval.batch_rows=5"), id="divided"),
        pytest.param((), id="fsdp", marks=pytest.mark.slow),
        pytest.param(("mesh.tensor=4",), id="tensor", marks=pytest.mark.slow),
        pytest.param(
            ("mesh.context=2", "mesh.tensor=2", "mesh.fsdp=2", "model.attention=xla"),
            id="all axes",
            marks=pytest.mark.slow,
        ),
        pytest.param(("mesh.fsdp=2", "mesh.data=3", "eval.batch_rows=5"), id="six devices", marks=pytest.mark.slow),
    ],
)
def test_neither_mesh_nor_batch_matters_to_a_figure(made, scored, overrides):
    """Nor does the order of the tasks."""
    expected = scored.result
    assert "the mesh takes 1 of 8 devices" in scored.err
    one_by_one = [str(scored.tasks / f"{name}.yaml") for name in TASKS]
    result = evaluate(made.run_dir, *overrides, tasks=one_by_one)
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=2 / expected["tokens"])
    assert (result["tokens"], result["bytes"]) == (expected["tokens"], expected["bytes"])
    for name, told in expected["tasks"].items():
        for metric, figure in told["metrics"].items():
            assert result["tasks"][name]["metrics"][metric]["value"] == pytest.approx(figure["value"], rel=1e-4), metric


def test_a_shorter_stride_gives_more_context_and_scores_the_same_bytes(made):
    short, long = (evaluate(made.run_dir, ALONE, f"eval.stride={stride}") for stride in (4, 32))
    assert short["stride"] == 4 and long["stride"] == 32
    assert short["bytes"] == long["bytes"] and short["tokens"] == long["tokens"]
    assert short["loss"] != long["loss"]


# What a process imports of training, on its last line.
PROGRAM = (
    "import sys; from llm_jax.__main__ import main; code = main(sys.argv[1:]); "
    "print([m for m in sorted(sys.modules) if m.startswith(('llm_jax.train.', 'llm_jax.optim.')) "
    "and not m.endswith('.config')], file=sys.stderr); sys.exit(code)"
)


def test_a_process_knows_no_training_and_says_the_same(made, start: Start):
    done = start("-c", PROGRAM, "eval", str(made.run_dir), "--step", "10", "--json").wait()
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    (line,) = done.stdout.splitlines()
    told, here = json.loads(line), evaluate(made.run_dir, ALONE, step=10)
    for name, value in here.items():
        assert told[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


@pytest.mark.slow
def test_as_processes_it_knows_no_training_and_several_agree(
    made, tasks, start: Start, launch_processes: LaunchProcesses
):
    arguments = ["-c", PROGRAM, "eval", str(made.run_dir), "--step", "10", "--json", "--tasks", str(tasks)]
    alone = start(*arguments, devices=1).wait()
    assert alone.returncode == 0, alone.stderr
    assert alone.stderr.splitlines()[-1] == "[]"
    first, second = launch_processes(2, 4, [*arguments, "mesh.tensor=4"])
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    # XLA's CPU collectives announce themselves on stdout too, from several threads at once.
    said = [[line for line in done.stdout.splitlines() if line.startswith("{")] for done in (first, second)]
    assert len(alone.stdout.splitlines()) == len(said[0]) == 1 and said[1] == []
    ours, theirs = json.loads(alone.stdout), json.loads(said[0][0])
    assert list(ours["tasks"]) == list(TASKS)
    for name, told in ours.pop("tasks").items():
        for metric, figure in told["metrics"].items():
            there = theirs["tasks"][name]["metrics"][metric]["value"]
            assert there == pytest.approx(figure["value"], rel=1e-4, abs=1e-6), metric
    theirs.pop("tasks")
    assert theirs.pop("loss") == pytest.approx(ours.pop("loss"), rel=1e-5)
    for name in ("perplexity", "bits_per_byte"):
        assert theirs.pop(name) == pytest.approx(ours.pop(name), rel=1e-4)
    assert theirs.pop("accuracy") == pytest.approx(ours.pop("accuracy"), abs=2 / ours["tokens"])
    assert ours == theirs


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_checkpoints_are_only_read_even_damaged_ones(copy, capsys):
    victim = next(path for path in (copy / "checkpoints" / "20").rglob("*") if path.parent.name == "d")
    victim.write_bytes(victim.read_bytes()[:-1])
    before = digests(copy / "checkpoints")
    assert evaluate(copy, ALONE)["step"] == 10
    err = capsys.readouterr().err
    assert "20 is damaged" in err and "the one before is used" in err
    with pytest.raises(CheckpointError, match=rf"checkpoints/20 .*{victim.name}"):
        evaluate(copy, step=20)
    assert digests(copy / "checkpoints") == before


def test_when_every_checkpoint_is_damaged_it_says_so(copy):
    for step in (10, 20):
        (copy / "checkpoints" / str(step) / "record.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged$"):
        evaluate(copy)


def test_weights_alone_are_restored_whatever_the_optimizer_kept(copy, scored):
    with jax.set_mesh(mesh_of(fsdp=8)):
        state = first_state(20)
        odd = dataclasses.replace(state, opt_state={"odd": state.step})
        save(copy, 30, odd, meta_of(copy))
    here = evaluate(copy, ALONE, "eval.batch_rows=3")
    assert here["step"] == 30 and here["loss"] == scored.result["loss"]


def test_restored_weights_are_the_saved_ones_bit_for_bit_on_any_mesh(made):
    with jax.set_mesh(mesh_of()):
        saved = jax.device_get(first_state(20).params)
    found = find(made.run_dir)
    run, sizes = adapt(found.run, ["mesh.context=2", "mesh.tensor=2"], 8, "cpu")
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        params, _ = restore_weights(found, run.model, mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), saved)


def rewrite(copy: Path, **changes: object) -> None:
    """Checkpoint 30: that of another version, as its record says."""
    with jax.set_mesh(mesh_of(fsdp=8)):
        save(copy, 30, first_state(20), meta_of(copy) | changes)


def test_what_another_version_wrote_is_refused_in_words(made, copy):
    rewrite(copy, format=2)
    with pytest.raises(Refused, match=r"checkpoint 30 of \S+ has format 2; this version of llm_jax reads format 1$"):
        evaluate(copy)
    newer = tree(made.run)
    newer["model"]["n_hats"] = 3
    shutil.rmtree(copy / "checkpoints" / "30")
    rewrite(copy, run=newer)
    with pytest.raises(Refused, match=r"was written by another version of llm_jax:\n  model\.n_hats: no such field"):
        evaluate(copy)
    assert evaluate(copy, ALONE, step=20)["step"] == 20


def test_a_tokenizer_that_the_weights_do_not_know_is_refused(made, copy, tmp_path):
    data = made.run.data.model_copy(update={"dir": str(tmp_path / "other")})
    other = prepare(data, made.run.tokenizer, 321, 0, report=lambda line: None)
    (copy / "tokenizer.model").write_bytes(other.tokenizer.model)
    with pytest.raises(Refused, match=r"tokenizer\.model is not the tokenizer that the weights were trained with"):
        evaluate(copy)
    (copy / "tokenizer.model").unlink()
    with pytest.raises(Refused, match=r"tokenizer\.model is missing; without it the weights mean nothing"):
        evaluate(copy)


def test_other_text_than_the_runs_is_refused(made, copy, tmp_path):
    with pytest.raises(DataError, match=r"^nothing prepared for this config"):
        evaluate(copy, f"data.dir={tmp_path / 'nowhere'}")
    rewrite(copy, data="0" * 64)
    with pytest.raises(DataError, match=r"is not what .* was trained on, so what is held out may have been trained on"):
        evaluate(copy)


def test_without_held_out_text_there_is_nothing_to_score(made, copy):
    data = made.run.data.model_copy(update={"test_share": 0.0})
    prepared = prepare(data, made.run.tokenizer, MODEL.vocab_size, 0, report=lambda line: None)
    (copy / "tokenizer.model").write_bytes(prepared.tokenizer.model)
    rewrite(copy, **checkpoint_meta(made.run.model_copy(update={"data": data}), prepared, {}))
    with pytest.raises(DataError, match=r"the test split has no text; raise data\.test_share, or give more text"):
        evaluate(copy)


def test_there_has_to_be_such_a_checkpoint(made, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no such run directory$"):
        evaluate(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    with pytest.raises(Refused, match="has no checkpoint yet; llm-jax train saves one"):
        evaluate(tmp_path / "run")
    with pytest.raises(Refused, match=r"has no checkpoint 15; there are 10, 20$"):
        evaluate(made.run_dir, step=15)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.d_model=32",
            r"^model\.d_model=32: an evaluation can only change eval, mesh, data\.dir, model",
        ),
        ("eval.stride=33", r"^eval\.stride = 33 is more than data\.seq_len = 32"),
        ("eval.strid=3", r"^eval\.strid: no such field; did you mean"),
        ("evaluation.stride=3", r"an evaluation can only change"),
        ("mesh.tensor=8", r"^model\.n_kv_heads = 4 is not divisible by mesh\.tensor = 8"),
        ("mesh.fsdp=-1", r"^mesh: more than one axis is -1 \(data, fsdp\)"),
        ("mesh.fsdp=0", r"^mesh\.fsdp = 0; an axis has at least 1 device"),
        ("mesh.data=16", r"^mesh needs 16 devices"),
    ],
)
def test_mistakes_in_one_line(made, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(made.run_dir, override)
    assert len(caught.value.lines) == 1


def test_the_mesh_is_the_trained_one_where_it_fits_else_fsdp():
    trained = MeshConfig(data=2, tensor=4)
    assert default_mesh(trained, 8) == trained
    assert default_mesh(MeshConfig(), 8) == MeshConfig()
    assert default_mesh(trained, 4) == default_mesh(trained, 16) == MeshConfig(data=1, fsdp=-1)


def test_attention_is_settled_for_the_machine_that_evaluates():
    run = Run(model=MODEL.model_copy(update={"attention": "chunked"}))
    assert adapt(run, [], 1, "gpu")[0].model.attention == "flash"
    assert adapt(run, ["model.attention=chunked"], 1, "gpu")[0].model.attention == "chunked"


def test_a_batch_is_rounded_up_to_the_devices(made):
    for rows, whole in ((5, 6), (6, 6), (1, 6), (7, 12)):
        run = made.run.model_copy(update={"eval": EvalConfig(batch_rows=rows)})
        assert whole_batch(run, mesh_of(fsdp=2, data=3)) == whole


def test_a_result_that_cannot_be_written_is_told_after_it_was_printed(copy, capsys):
    (copy / "eval.jsonl").mkdir()
    with pytest.raises(ResultError, match=r"the result cannot be added to \S+eval\.jsonl: Is a directory") as caught:
        evaluate(copy, ALONE)
    assert caught.value.exit_code == 74
    assert json.loads(capsys.readouterr().out)["step"] == 20


def test_generate_prints_the_prompt_and_what_follows(made, capsys):
    generate_text(str(made.run_dir), None, [ALONE], Asked(["ab"], SHORT))
    first = capsys.readouterr().out
    generate_text(str(made.run_dir), None, DIVIDED, Asked(["ab"], SHORT))
    assert first == capsys.readouterr().out
    assert first.startswith("ab") and first.endswith("\n") and len(first) > 3
    generate_text(str(made.run_dir), 10, [ALONE], Asked(["ab", "cd"], SHORT))
    several = capsys.readouterr().out
    assert several.startswith("[1/2] ab") and "\n[2/2] cd" in several


def texts_of(made: Made, capsys: pytest.CaptureFixture[str], asked: Asked, *overrides: str) -> list[dict]:
    generate_text(str(made.run_dir), None, overrides, asked._replace(as_json=True))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_has_a_line_for_each_text_whatever_shares_a_batch(made, capsys):
    """Ids say the text, and the likelihood is the scorer's; a prompt longer than a row is told."""
    long = "abc def " * 40
    asked = Asked(["ab", "", long], SHORT, samples=3)
    told = texts_of(made, capsys, asked, *DIVIDED, "eval.batch_rows=2")
    assert [text["prompt"] for text in told] == ["ab"] * 3 + [""] * 3 + [long] * 3
    assert told[0]["text"] != told[1]["text"]
    tokenizer = made.prepared.tokenizer
    for text in told:
        assert tuple(text) == ("prompt", "text", "ids", "log_likelihood", "ended")
        assert tokenizer.decode(text["ids"]) == text["text"] and text["ended"] in ("length", "document")
        n = len(text["ids"]) + (text["ended"] == "document")
        assert -10 * n < text["log_likelihood"] < -n
    alone = texts_of(made, capsys, asked, ALONE, "eval.batch_rows=1")
    for text, other in zip(told, alone, strict=True):
        assert text.pop("log_likelihood") == pytest.approx(other.pop("log_likelihood"), abs=1e-3)
    assert told == alone
    generate_text(str(made.run_dir), None, [ALONE], Asked([long], SHORT))
    assert capsys.readouterr().err.splitlines()[-1].endswith("tokens; the model sees the last 32")


def test_the_likelihood_of_a_text_is_the_scorers(made, capsys):
    (text,) = texts_of(made, capsys, Asked(["ab"], SHORT), ALONE)
    found = find(made.run_dir)
    run, sizes = adapt(found.run, [ALONE], 8, "cpu")
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        score, weights = make_score(run.model), restore_weights(found, run.model, mesh)
        context = [BOS_ID, *found.tokenizer.encode("ab").tolist()]
        end = [EOS_ID] if text["ended"] == "document" else []
        (scored,) = log_likelihoods(score, weights, [Pair(context, text["ids"] + end)], seq_len=32, batch_rows=3)
    assert scored.log_likelihood == pytest.approx(text["log_likelihood"], abs=1e-3)


def test_a_stop_string_ends_a_text_and_its_ids(made, capsys):
    (whole,) = texts_of(made, capsys, Asked(["ab"], SHORT), ALONE)
    stop = whole["text"][3:5]
    (cut,) = texts_of(made, capsys, Asked(["ab"], SHORT, stops=[stop]), ALONE)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["ended"] == "stop"
    assert cut["ids"] == whole["ids"][: len(cut["ids"])] and len(cut["ids"]) < len(whole["ids"])
    assert cut["log_likelihood"] > whole["log_likelihood"]
    generate_text(str(made.run_dir), None, [ALONE], Asked(["ab"], SHORT, stops=[stop]))
    assert capsys.readouterr().out == "ab" + cut["text"] + "\n"


def test_beams_give_the_best_texts_and_their_scores(made, capsys):
    told = texts_of(made, capsys, Asked(["ab", "c"], SEARCH, samples=2), ALONE)
    assert [text["prompt"] for text in told] == ["ab", "ab", "c", "c"]
    assert told[0]["score"] >= told[1]["score"] and told[0]["score"] > told[0]["log_likelihood"]


def test_generation_stops_between_chunks(made, capsys):
    for asked in (Asked(["ab"], SHORT), Asked(["ab", "c"], SHORT), Asked(["ab", "c"], SEARCH)):
        generate_text(str(made.run_dir), None, [ALONE], asked, stop=lambda: True)
        assert len(capsys.readouterr().out) < 30


def test_a_causal_model_fills_no_masks(made):
    with pytest.raises(Refused, match=r"is a causal language model, which fills no masks; llm-jax generate \S+ cont"):
        fill_mask(str(made.run_dir), None, [], FillAsked(["a[MASK]"]))


def test_prompts_are_read_from_files(tmp_path):
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_bytes("def main(\n\n  caf\u00e9\r\n".encode())
    assert cli_module.read_prompts(str(lines)) == ["def main(", "  caf\u00e9"]
    records.write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n')
    assert cli_module.read_prompts(str(records)) == ["a\nb", ""]
    for content, line in [
        ("\n", "there is no prompt in it"),
        ('{"prompt": 3}', r'line 1: has no "prompt" that is text'),
        ('{"prompt": "a"}\n[]', r'line 2: has no "prompt" that is text'),
        ("text", "line 1: is not JSON"),
    ]:
        records.write_text(content)
        with pytest.raises(ConfigError, match=line):
            cli_module.read_prompts(str(records))
    lines.write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match=r"prompts\.txt: is not UTF-8 at byte 2$"):
        cli_module.read_prompts(str(lines))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("generate", "--prompts", "nowhere.txt"), "--prompts nowhere.txt: No such file or directory"),
        (("generate", "--prompts", "x", "--prompt", "y"), "--prompt and --prompts: give one of the two"),
        (("generate", "--top-k", "0"), "--top-k 0: must be at least 1"),
        (("generate", "--top-p", "0"), "--top-p 0: must be above 0, up to 1"),
        (("generate", "--min-p", "1.5"), "--min-p 1.5: must be above 0, up to 1"),
        (("generate", "--repetition-penalty", "nan"), "--repetition-penalty nan: must be above 0, up to 100"),
        (("generate", "--length-penalty", "-1"), "--length-penalty -1: must be from 0 to 10"),
        (("generate", "--stop", ""), "--stop '': must not be empty"),
        (("generate", "--stop", "\\x"), r"--stop '\\x': is no escape that Python knows; a backslash is \\"),
        (("generate", "--beams", "2", "--samples", "3"), "--samples 3: --beams 2 finds no more than that many"),
        (
            ("generate", "--beams", "2", "--top-p", "0.5", "--seed", "1"),
            "--top-p, --seed: nothing to do with --beams, which compares whole likely texts",
        ),
        (("generate", "--max-tokens", "0"), "--max-tokens 0: must be at least 1"),
        (("generate", "--temperature", "-1"), "--temperature -1: must be from 0 to 100"),
        (("generate", "--temperature", "nan"), "--temperature nan: must be from 0 to 100"),
        (("generate", "--prompt", "\udcff"), r"--prompt '\udcff': is not UTF-8"),
        (("generate", "--seed", "-3"), "--seed -3: must be from 0 to 2147483647"),
        (("generate", "--promt", "x"), "llm-jax generate: --promt: no such option; did you mean --prompt?"),
        (("eval", "--stepp=5"), "llm-jax eval: --stepp=5: no such option; did you mean --step?"),
    ],
)
def test_mistakes_in_arguments_in_one_line(arguments, line):
    verb = {"generate": cli_module.generate, "eval": cli_module.evaluate}[arguments[0]]
    with pytest.raises(ConfigError) as caught:
        verb(["runs/none", *arguments[1:]])
    assert str(caught.value) == line


def test_the_command_line(made, capsys):
    options = ("--prompt", "ab", "--max-tokens", "3", "--top-k", "5", "--stop", r"\n", "--samples", "2", "--json")
    assert main(["generate", str(made.run_dir), *options, ALONE]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["ab", "ab"]
    assert main(["eval", str(made.run_dir), "--step", "15"]) == 3
    assert capsys.readouterr().err == f"{made.run_dir} has no checkpoint 15; there are 10, 20\n"


@pytest.mark.slow
def test_the_command_line_as_processes(made, cli: Cli):
    options = ("--prompt", "ab", "--max-tokens", "3", "--top-k", "5", "--stop", r"\n", "--samples", "2", "--json")
    done = cli("generate", str(made.run_dir), *options)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["ab", "ab"]
    done = cli("eval", str(made.run_dir), "--step", "15")
    assert done.returncode == 3 and done.stderr == f"{made.run_dir} has no checkpoint 15; there are 10, 20\n"


def test_eval_config_is_checked_before_training():
    with pytest.raises(ConfigError, match=r"^eval\.stride = 300"):
        check(Run(eval=EvalConfig(stride=300)))
