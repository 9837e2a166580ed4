"""`llm-jax eval` on a masked language model: fixed rows and masks, and no figure that would mean nothing."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from llm_jax.data.config import SPECIAL_PIECES
from llm_jax.data.loader import open_rows
from llm_jax.data.prepare import prepare
from llm_jax.eval.dropless import dropless
from llm_jax.eval.figures import Sums
from llm_jax.eval.fill import filled, in_brackets
from llm_jax.eval.generation import Asked, generate_text
from llm_jax.eval.perplexity import NotFinite, score_rows
from llm_jax.eval.restore import adapt
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.objective.config import MlmConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.run_directory import Refused
from llm_jax.train.start import checkpoint_meta
from llm_jax.train.state import init_state
from tests.small import mesh_of
from tests.test_eval_verbs import MODEL, SHORT, Made, evaluate, save, text_source, write_texts

WEIGHTS = (nnx.State({}), nnx.State({}))
NOTHING = ("bits_per_byte", "zlib_bits_per_byte", "lzma_bits_per_byte", "stride", "suite")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("masked")
    write_texts(root / "texts")
    data = text_source(root)
    run = Run(name="masked", run_dir=str(root / "run"), model=MODEL, data=data, objective=MlmConfig(rate=0.3))
    prepared = prepare(data, run.tokenizer, MODEL.vocab_size, run.seed, report=lambda line: None)
    with jax.set_mesh(mesh_of()):
        meta, state = checkpoint_meta(run, prepared, {}), jax.jit(lambda: init_state(MODEL, AdamWConfig(), 0))()
        save(root / "run", 20, state, meta)
        halved = jax.tree.map(lambda weight: weight / 2, state.params)
        save(root / "run", 10, dataclasses.replace(state, params=halved), meta)
    (root / "run" / "tokenizer.model").write_bytes(prepared.tokenizer.model)
    return Made(root / "run", run, prepared)


def test_json_has_every_name_and_nulls_for_what_means_nothing(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    told = evaluate(made.run_dir)
    assert json.loads(capsys.readouterr().out) == told
    assert {name for name, value in told.items() if value is None} == set(NOTHING)
    rows_NU = open_rows(made.prepared, "test")[np.arange(10_000)]
    free_N = (rows_NU[:, :-1] >= len(SPECIAL_PIECES)).sum(axis=1)
    assert told["tokens"] == sum((6 * int(n) + 10) // 20 for n in free_N) > 500
    assert told["bytes"] >= told["tokens"] and told["perplexity"] == pytest.approx(math.exp(told["loss"]))
    earlier = evaluate(made.run_dir, step=10)
    assert earlier["bytes"] == told["bytes"] and earlier["loss"] != told["loss"], "the same masks for every checkpoint"


def test_neither_mesh_nor_batch_matters(made: Made) -> None:
    expected = evaluate(made.run_dir)
    result = evaluate(made.run_dir, "mesh.context=2", "mesh.tensor=2", "mesh.fsdp=2", "eval.batch_rows=5")
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=2 / expected["tokens"])
    assert (result["tokens"], result["bytes"]) == (expected["tokens"], expected["bytes"])


def test_the_table_and_the_filled_row(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(made.run_dir, as_json=False)
    out = capsys.readouterr().out
    record = json.loads((made.run_dir / "eval.jsonl").read_text().splitlines()[-1])
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
