"""`llm-jax eval` on a masked language model: fixed rows and masks, and no figure that would mean nothing."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID, SPECIAL_PIECES
from llm_jax.data.loader import open_rows
from llm_jax.data.prepare import prepare
from llm_jax.eval import cli
from llm_jax.eval.config import EvalConfig
from llm_jax.eval.dropless import dropless
from llm_jax.eval.evaluation import evaluate_checkpoint
from llm_jax.eval.figures import Sums
from llm_jax.eval.fill import filled, in_brackets
from llm_jax.eval.fill_mask import MASK, fill_mask
from llm_jax.eval.fill_mask import Asked as FillAsked
from llm_jax.eval.generation import Asked, generate_text
from llm_jax.eval.perplexity import NotFinite, score_rows
from llm_jax.eval.pseudo import Inside, make_masked_score, masked_scores
from llm_jax.eval.requests import Pair
from llm_jax.eval.restore import adapt, find, restore_weights
from llm_jax.eval.tasks import masked_model
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.objective.config import MlmConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.run_directory import Refused
from llm_jax.train.start import checkpoint_meta
from llm_jax.train.state import init_state
from tests.conftest import LaunchProcesses
from tests.small import mesh_of
from tests.test_eval_verbs import MODEL, SHORT, Made, evaluate, save, text_source, write_texts

WEIGHTS = (nnx.State({}), nnx.State({}))
NOTHING = ("bits_per_byte", "zlib_bits_per_byte", "lzma_bits_per_byte", "stride")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("masked")
    write_texts(root / "texts")
    data = text_source(root)
    few = EvalConfig(pseudo_tokens=60)
    run = Run(name="masked", run_dir=str(root / "run"), model=MODEL, data=data, objective=MlmConfig(rate=0.3), eval=few)
    prepared = prepare(data, run.tokenizer, MODEL.vocab_size, run.seed, report=lambda line: None)
    with jax.set_mesh(mesh_of()):
        init = jax.jit(lambda: init_state(MODEL, AdamWConfig(), 0))
        meta, state = checkpoint_meta(run, prepared, {}), init()
        save(root / "run", 20, state, meta)
        halved = jax.tree.map(lambda weight: weight / 2, state.params)
        save(root / "run", 10, dataclasses.replace(state, params=halved), meta)
    (root / "run" / "tokenizer.model").write_bytes(prepared.tokenizer.model)
    return Made(root / "run", run, prepared)


@pytest.fixture(scope="module")
def scored(made: Made) -> tuple[dict[str, Any], str]:
    """The newest checkpoint's result on one device, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return evaluate(made.run_dir, "mesh.data=1"), out.getvalue()


def test_json_has_every_name_and_nulls_for_what_means_nothing(made: Made, scored: tuple[dict[str, Any], str]) -> None:
    told, out = scored
    assert json.loads(out) == told
    assert {name for name, value in told.items() if value is None} == set(NOTHING)
    rows_NU = open_rows(made.prepared, "test")[np.arange(10_000)]
    free_N = (rows_NU[:, :-1] >= len(SPECIAL_PIECES)).sum(axis=1)
    assert told["tokens"] == sum((6 * int(n) + 10) // 20 for n in free_N) > 500
    assert told["bytes"] >= told["tokens"] and told["perplexity"] == pytest.approx(math.exp(told["loss"]))
    earlier = evaluate(made.run_dir, "mesh.data=1", step=10)
    assert earlier["bytes"] == told["bytes"] and earlier["loss"] != told["loss"], "the same masks for every checkpoint"


@pytest.mark.slow
def test_neither_mesh_nor_batch_matters(made: Made, scored: tuple[dict[str, Any], str]) -> None:
    expected, _ = scored
    result = evaluate(made.run_dir, "mesh.data=1", "mesh.context=2", "mesh.tensor=2", "eval.batch_rows=5")
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=2 / expected["tokens"])
    assert (result["tokens"], result["bytes"]) == (expected["tokens"], expected["bytes"])
    for variant, figure in expected["pseudo_perplexity"].items():
        assert result["pseudo_perplexity"][variant] == pytest.approx(figure, rel=1e-5), variant


def test_the_table_and_the_filled_row(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(made.run_dir, "mesh.data=1", as_json=False)
    out = capsys.readouterr().out
    record = json.loads((made.run_dir / "eval.jsonl").read_text().splitlines()[-1])
    pseudo = result["pseudo_perplexity"]
    assert pseudo["tokens"] == 60 and pseudo["original"]["low"] < pseudo["original"]["value"] < 2 * MODEL.vocab_size
    assert pseudo["original"] != pseudo["within_word_l2r"]
    for told in ("pseudo-perplexity", f"{pseudo['original']['value']:.3f}", "no default suite"):
        assert told in out
    for told in ("masked after 20 steps", f"{result['loss']:.4f}", "masked-token accuracy", f"{result['tokens']:,}"):
        assert told in out
    for absent in ("bits per byte", "zlib", "windows", "next-token"):
        assert absent not in out
    parts = record["sample"]["filled"]
    assert in_brackets([(text, original) for text, original in parts]) in out
    row_T = open_rows(made.prepared, "test")[np.zeros(1, int)][0, :-1]
    assert "".join(
        text if original is None else original for text, original in parts
    ) == made.prepared.tokenizer.decode(row_T)
    asked = [part for part in parts if part[1] is not None]
    assert len(asked) == (6 * int((row_T >= len(SPECIAL_PIECES)).sum()) + 10) // 20


def test_guesses_stand_where_their_tokens_were(made: Made) -> None:
    tokenizer = made.prepared.tokenizer
    ids = tokenizer.encode("ab cd\n").tolist()
    wrong = tokenizer.encode("j").tolist()[-1]
    parts = filled(ids, {0: ids[0], len(ids) - 1: wrong}, tokenizer)
    first = tokenizer.decode(ids[:1])
    assert parts[0] == (first, first) and parts[-1] == (tokenizer.decode([wrong]), "\n")
    assert in_brackets(parts) == f"[{first}]{tokenizer.decode(ids[1:-1])}[{tokenizer.decode([wrong])}|\\n]"


def test_tasks_are_scored_by_pseudo_log_likelihoods(made: Made, tmp_path: Path) -> None:
    kinds = {
        "minimal_pairs": {"sentence_good": "abc de fgh", "sentence_bad": "fgh de abc"},
        "multiple_choice": {"question": "ab cd", "choices": [" ef", " gh"], "answer": 1},
        "cloze": {"text": "ab cd ef"},
        "bits_per_byte": {"text": "hij abc def\n" * 20},
        "crows_pairs": {"sent_more": "abc de fgh", "sent_less": "abc ja fgh", "bias_type": "x"},
        "crows_pairs_whole_sentence": {"sent_more": "abc de fgh", "sent_less": "abc ja fgh", "bias_type": "x"},
        "generation": {"prompt": "a", "answer": "b"},
    }
    for kind, record in kinds.items():
        (tmp_path / f"{kind}.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
        (tmp_path / f"{kind}.yaml").write_text(f"kind: {kind}\ndata: {kind}.jsonl\n")
    refused = str(tmp_path / "generation.yaml")
    with pytest.raises(Refused, match=r"^generation: generation needs a causal language model"):
        evaluate_checkpoint(str(made.run_dir), None, [], split="test", as_json=True, tasks=[refused])
    (tmp_path / "generation.yaml").unlink()
    one = ["mesh.data=1"]
    result = evaluate_checkpoint(str(made.run_dir), None, one, split="test", as_json=True, tasks=[str(tmp_path)])
    assert result is not None
    told = result["tasks"]
    assert set(told) == set(kinds) - {"generation"}
    assert told["minimal_pairs"]["metrics"]["accuracy"]["value"] in (0.0, 1.0)
    # 20 lines are more than a window of 32, which a masked model does not need to be told.
    assert 2 < told["bits_per_byte"]["metrics"]["pseudo_bits_per_byte"]["value"] < 20
    # The paper's metric is another one than the sentences' own.
    found = find(str(made.run_dir))
    run, _ = adapt(found.run, [], 1, "cpu")
    with jax.set_mesh(mesh_of()):
        weights = restore_weights(found, run.model, mesh_of())
        score = make_masked_score(run.model)
        model = masked_model(score, weights, run, found.tokenizer, batch_rows=4, stop=lambda: False)
        ids = [found.tokenizer.bos_id, *found.tokenizer.encode("abc de fgh").tolist()]
        assert model.inside is not None
        (whole,) = model.inside([Inside(ids, range(1, len(ids)))]) or ()
        parts = model.inside([Inside(ids, [place]) for place in range(1, len(ids))]) or ()
        (likelihood,) = model.likelihoods([Pair(ids[:1], ids[1:])]) or ()
    assert whole == pytest.approx(sum(parts)) and whole != pytest.approx(likelihood.log_likelihood, rel=1e-6)


def test_masks_are_filled_alike_on_any_mesh_and_in_any_batch(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["ab [MASK] cd", "[MASK]", "ab[MASK]\n  [MASK] [MASK]", "ab " * 8 + "[MASK]"]

    def told(asked: list[str], *overrides: str) -> list[dict]:
        fill_mask(str(made.run_dir), None, overrides, FillAsked(asked, 3, as_json=True))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    together = told(texts, "mesh.data=1")
    apart = told(texts[2:3], "mesh.data=1", "mesh.context=2", "mesh.tensor=2", "eval.batch_rows=2")
    assert [record["text"] for record in together] == texts
    assert [len(record["masks"]) for record in together] == [1, 1, 3, 1]
    assert apart[0]["filled"] == together[2]["filled"]
    for mine, other in zip(apart[0]["masks"], together[2]["masks"], strict=True):
        assert [guess["id"] for guess in mine] == [guess["id"] for guess in other]
        shares = [guess["probability"] for guess in mine]
        assert shares == pytest.approx([guess["probability"] for guess in other], rel=1e-4)
        assert shares == sorted(shares, reverse=True) and min(guess["id"] for guess in mine) >= len(SPECIAL_PIECES)
    tokenizer = made.prepared.tokenizer
    first = [guesses[0]["piece"] for guesses in together[2]["masks"]]
    assert together[2]["filled"] == f"ab{first[0]}\n  {first[1]}{first[2]}"
    assert first == [tokenizer.decode([guesses[0]["id"]]) for guesses in together[2]["masks"]]
    assert together[0]["filled"] == f"ab{together[0]['masks'][0][0]['piece']} cd"


@pytest.mark.slow
def test_two_processes_fill_masks_as_one(made: Made, tmp_path: Path, launch_processes: LaunchProcesses) -> None:
    """Process 0 alone tells, and of a text that nobody can fill both say the same."""
    (tmp_path / "texts").write_text("ab [MASK] cd\n[MASK]\nab[MASK] [MASK] [MASK]\n")
    arguments = ["-m", "llm_jax", "fill-mask", str(made.run_dir), "--texts", str(tmp_path / "texts"), "--json"]
    ((alone,), both) = (launch_processes(n, 4 // n, [*arguments, "mesh.tensor=2"]) for n in (1, 2))
    assert [done.returncode for done in (alone, *both)] == [0, 0, 0], alone.stderr + both[0].stderr
    ours, theirs, none = ([json.loads(x) for x in done.stdout.splitlines() if x[0] == "{"] for done in (alone, *both))
    assert len(ours) == len(theirs) == 3 and none == []
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["filled"] == other["filled"]
        pairs = [pair for masks in zip(mine["masks"], other["masks"], strict=True) for pair in zip(*masks, strict=True)]
        for one, two in pairs:
            assert one["id"] == two["id"] and one["probability"] == pytest.approx(two["probability"], rel=1e-4)
    (tmp_path / "texts").write_text("ab\n")
    for done in launch_processes(2, 2, arguments):
        assert done.returncode == 2 and "has no [MASK]" in done.stderr


def test_a_guess_has_the_probability_that_the_pseudo_log_likelihood_has(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_mask(str(made.run_dir), None, ["mesh.data=1"], FillAsked(["ab cd[MASK] ef"], 4, as_json=True))
    (guesses,) = json.loads(capsys.readouterr().out)["masks"]
    found = find(str(made.run_dir))
    run, _ = adapt(found.run, [], 1, "cpu")
    before, after = ([*found.tokenizer.encode(text).tolist()] for text in ("ab cd", " ef"))
    with jax.set_mesh(mesh_of()):
        weights, score = restore_weights(found, run.model, mesh_of()), make_masked_score(run.model)
        texts = [Inside([BOS_ID, *before, guess["id"], *after], [1 + len(before)]) for guess in guesses]
        told = masked_scores(score, weights, texts, None, seq_len=32, batch_rows=4)
    assert told is not None
    nats = [float(text.nll_N[0]) for text in told]
    assert [math.exp(-each) for each in nats] == pytest.approx([guess["probability"] for guess in guesses], rel=1e-4)


def test_fill_mask_is_for_people_too_and_refuses_in_one_line(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    fill_mask(str(made.run_dir), None, ["mesh.data=1"], FillAsked(["ab [MASK][MASK]"], 2))
    head, first, *_, filled, last = capsys.readouterr().out.split("\n")[:-1]
    assert head == "ab [MASK][MASK]" and first == "[MASK] 1, the others hidden too:"
    assert filled.startswith("ab") and MASK not in filled and last == ""
    for texts, line in (
        (["ab"], "^--text 'ab': has no \\[MASK\\]$"),
        (["ab " * 40 + MASK], r"^--text 'ab ab .*'\.\.\.: has \d+ tokens, and the model sees 32 at once"),
    ):
        with pytest.raises(ConfigError, match=line):
            fill_mask(str(made.run_dir), None, ["mesh.data=1"], FillAsked(texts))
    fill_mask(str(made.run_dir), None, ["mesh.data=1"], FillAsked(["a[MASK]"]), stop=lambda: True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "--text and --texts: give one of the two"),
        (("--text", "a", "--texts", "b"), "--text and --texts: give one of the two"),
        (("--text", "a[MASK]", "--top", "0"), "--top 0: must be at least 1"),
        (("--texts", "nowhere.txt"), "--texts nowhere.txt: No such file or directory"),
    ],
)
def test_what_cannot_be_filled_is_told_in_a_line(arguments: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.fill_mask(["runs/none", *arguments])
    assert str(caught.value) == line


def test_generate_is_refused_in_one_line(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        Refused, match=r"^\S+ is a masked language model, which continues no text; llm-jax eval"
    ) as caught:
        generate_text(str(made.run_dir), None, [], Asked(["ab"], SHORT))
    assert caught.value.exit_code == 3 and capsys.readouterr() == ("", "")


def test_broken_weights_are_told() -> None:
    sums = [Sums(1.0, 0, 1, 1), Sums(math.nan, 0, 1, 1)]
    assert score_rows(lambda weights, t: sums[0], WEIGHTS, 7, 4) == Sums(2.0, 0, 2, 2)
    with pytest.raises(NotFinite, match=r"^the loss of rows 4 and on is not a number"):
        score_rows(lambda weights, t: sums[t], WEIGHTS, 7, 4)


def test_experts_drop_nothing_when_held_out_text_is_scored() -> None:
    moe = MoeConfig(experts=4, capacity_factor=1.25, grouped_matmul="einsum", exchange="all_to_all")
    model = ModelConfig(period=(LayerConfig(moe=True),), moe=moe)
    assert dropless(MODEL) == MODEL
    free = dropless(model)
    assert (
        free == model.model_copy(update={"moe": MoeConfig(experts=4), "attention": "auto"}) and dropless(free) == free
    )
    run, _ = adapt(Run(model=model), [], 1, "cpu")
    assert run.model.moe is not None and run.model.moe.capacity_factor is None
    assert "auto" not in (run.model.attention, run.model.moe.exchange, run.model.moe.grouped_matmul)
    run.model.check()
