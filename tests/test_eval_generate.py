"""Text: the likeliest or drawn tokens, the same for a seed on every mesh, streamed without broken characters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import BOS_ID, EOS_ID, TokenizerConfig
from llm_jax.eval import generate
from llm_jax.eval.generate import Sampling, make_next_token, row_length, sample, stream
from llm_jax.model.transformer import abstract_model, logits
from tests.small import CFG as SMALL
from tests.small import mesh_of, put_weights, weights_of

CFG = SMALL.model_copy(update={"vocab_size": 300})
SEQ_LEN = 24
GREEDY = Sampling(max_tokens=40, temperature=0.0, seed=0)
NOTHING = nnx.State({})


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(
        ["import os\n\ndef walk(path: str) -> None:\n    print('\u00e9')\n" * 20], TokenizerConfig(), 300
    )


def text_of(tokenizer, sampling, *, mesh=None, prompt="def", row=0):
    mesh = mesh or mesh_of()
    with jax.set_mesh(mesh):
        params = put_weights(weights_of(CFG), CFG, mesh)
        return sample(make_next_token(CFG, SEQ_LEN), (params, {}), tokenizer, prompt, sampling, row)


@functools.cache
def all_logits():
    """Logits of a whole row, in one shape; on one device."""
    with jax.set_mesh(mesh_of()):
        graph = abstract_model(CFG).graph

    @jax.jit
    def all_logits(params, tokens_BT):
        model = nnx.merge(graph, params, {})
        positions_BT = jnp.arange(SEQ_LEN)[None]
        return logits(model, model(tokens_BT, jnp.zeros_like(tokens_BT), positions_BT, CFG)[0], CFG)

    return all_logits


def next_logits(ids):
    """Float32 logits [V] after the last SEQ_LEN ids."""
    seen = ids[-SEQ_LEN:]
    tokens_BT = np.asarray([seen + [0] * (SEQ_LEN - len(seen))], np.int32)
    with jax.set_mesh(mesh_of()):
        params = put_weights(weights_of(CFG), CFG, mesh_of())
        return np.asarray(all_logits()(params, tokens_BT)[0, len(seen) - 1, : CFG.vocab_size])


def test_temperature_0_takes_the_likeliest_token_each_time(tokenizer, monkeypatch):
    monkeypatch.setattr(generate, "SHORTEST", 8)  # rows of 8, 16 and 24, and then a window that moves on
    ids = [BOS_ID, *tokenizer.encode("def").tolist()]
    start = len(ids)
    while len(ids) < start + GREEDY.max_tokens:
        logits_V = next_logits(ids)
        second, first = np.sort(logits_V)[-2:]
        assert first - second > 1e-4, "choose another seed: two tokens are equally likely"
        ids.append(int(logits_V.argmax()))
    assert not {BOS_ID, EOS_ID} & set(ids[1:])
    assert text_of(tokenizer, GREEDY) == tokenizer.decode(ids[start:])


def test_a_seed_gives_the_same_text_on_every_mesh(tokenizer):
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=3)
    expected = text_of(tokenizer, sampling)
    for sizes in ({}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"context": 2, "fsdp": 2, "tensor": 2}):
        assert text_of(tokenizer, sampling, mesh=mesh_of(**sizes)) == expected, sizes


def test_seed_row_and_position_each_make_a_difference(tokenizer):
    texts = [
        text_of(tokenizer, Sampling(max_tokens=8, temperature=5.0, seed=seed), row=row)
        for seed, row in itertools.product((0, 1), (0, 1))
    ]
    assert len(set(texts)) == 4
    # A flat distribution would repeat one token for ever if the position were not in the key.
    with jax.set_mesh(mesh_of()):
        zero = (put_weights(jax.tree.map(np.zeros_like, weights_of(CFG)), CFG, mesh_of()), nnx.State({}))
        next_token = make_next_token(CFG, SEQ_LEN)
        drawn = {next_token(zero, [BOS_ID] * n, Sampling(1, 1.0, 0), 0) for n in range(1, 9)}
    assert len(drawn) > 4


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_temperature_is_that_of_the_softmax(temperature):
    ids, n = [BOS_ID, 7, 8], 400
    scaled_V = next_logits(ids).astype(np.float64) / temperature
    p_V = np.exp(scaled_V) / np.exp(scaled_V).sum()
    with jax.set_mesh(mesh_of()):
        params = put_weights(weights_of(CFG), CFG, mesh_of())
        next_token = make_next_token(CFG, SEQ_LEN)
        drawn = [next_token((params, {}), ids, Sampling(1, temperature, 0), row) for row in range(n)]
    p, share = p_V.max(), drawn.count(int(p_V.argmax())) / n
    assert share == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n))


def test_few_row_lengths_that_the_context_axis_divides():
    lengths = (1, 64, 65, 129, 256, 257, 384)
    assert [row_length(n, 384, 1) for n in lengths] == [64, 64, 128, 256, 256, 384, 384]
    assert [row_length(n, 384, 3) for n in lengths] == [66, 66, 129, 258, 258, 384, 384]


def given(ids):
    """A model that says these ids, whatever it sees."""
    said = iter(ids)
    return lambda params, seen, sampling, row: next(said)


def test_a_characters_bytes_are_held_back_until_it_is_whole(tokenizer):
    ids = [tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u20ac".encode()]
    pieces = list(stream(given([*ids, ids[0]]), NOTHING, tokenizer, "", Sampling(4, 0.0, 0)))
    assert pieces == ["", "", "\u20ac", "", "\ufffd"]


@pytest.mark.parametrize("border", [BOS_ID, EOS_ID])
def test_text_ends_where_its_document_does(tokenizer, border):
    a, b = tokenizer.encode("import os").tolist()[:1] * 2
    assert sample(given([a, border, b]), NOTHING, tokenizer, "", GREEDY) == tokenizer.decode([a])


def test_what_a_model_sees_begins_with_bos_and_the_prompt(tokenizer):
    seen = []

    def next_token(params, ids, sampling, row):
        seen.append(list(ids))
        return 9

    sample(next_token, NOTHING, tokenizer, "import", Sampling(2, 0.0, 0))
    prompt = [BOS_ID, *tokenizer.encode("import").tolist()]
    assert seen == [prompt, [*prompt, 9]]
