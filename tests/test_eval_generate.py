"""Text: the likeliest or drawn tokens, the same for a seed whatever shares the batch or the mesh, whole characters."""

import dataclasses
import functools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from scipy.special import chdtri  # chi-square's quantile, by degrees of freedom and what is left above it

from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import BOS_ID, EOS_ID, TokenizerConfig
from llm_jax.eval import generate
from llm_jax.eval.generate import Prompt, Text, continued, decoding, make_decoder, prompt_of, streams
from llm_jax.eval.restore import for_decoding
from llm_jax.eval.sampling import Sampling, draw, filtered
from llm_jax.model.transformer import abstract_model, logits
from tests.small import CFG as SMALL
from tests.small import mesh_of, put_weights, weights_of

CFG = SMALL.model_copy(update={"vocab_size": 300})
SEQ_LEN = 48
# More than a row holds.
GREEDY = Sampling(max_tokens=100, temperature=0.0)
DRAWN = Sampling(30, temperature=1.0, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(
        ["import os\n\ndef walk(path: str) -> None:\n    print('\u00e9')\n" * 20], TokenizerConfig(), 300
    )


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(generate, "SHORTEST", 8)


@functools.cache
def decoder_on(sampling: Sampling, sizes: tuple[tuple[str, int], ...]):
    with jax.set_mesh(mesh_of(**dict(sizes))):
        params = put_weights(weights_of(CFG), CFG, mesh_of(**dict(sizes)))
        with for_decoding((params, {}), CFG) as (weights, cfg):
            return weights, make_decoder(cfg, SEQ_LEN, sampling), jax.sharding.get_mesh()


def ids_of(prompts, sampling, **sizes) -> list[list[int]]:
    weights, decoder, mesh = decoder_on(sampling, tuple(sizes.items()))
    with jax.set_mesh(mesh):
        parts = list(decoding(decoder, weights, prompts))
    return [[i for piece in pieces for i in piece.ids] for pieces in zip(*parts, strict=True)]


def test_the_devices_of_a_context_axis_divide_the_weights() -> None:
    """A token at a time has no positions to divide. Vectors are whole everywhere, and little."""
    (params, _), _, mesh = decoder_on(DRAWN, (("context", 2), ("tensor", 2)))
    assert dict(mesh.shape) | {"context": 1, "fsdp": 2, "tensor": 2} == dict(mesh.shape)
    leaves = jax.tree.leaves(params)
    assert sum(x.addressable_shards[0].data.nbytes for x in leaves) < 0.3 * sum(x.nbytes for x in leaves)


def three_prompts() -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [Prompt([BOS_ID, *rng.integers(8, 300, n).tolist()], row) for row, n in enumerate((2, 10, 6))]


@functools.cache
def all_logits():
    with jax.set_mesh(mesh_of()):
        graph, params = abstract_model(CFG).graph, put_weights(weights_of(CFG), CFG, mesh_of())

        @jax.jit
        def all_logits(tokens_BT: Array) -> Array:
            model = generate.nnx.merge(graph, params, {})
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
            return logits(model, model(tokens_BT, jnp.zeros_like(tokens_BT), positions_BT, CFG)[0], CFG)

    return all_logits


def next_logits(ids) -> np.ndarray:
    """Float32 logits [V] after the ids, by a full forward pass."""
    tokens_BT = np.asarray([[*ids] + [0] * (SEQ_LEN - len(ids))], np.int32)
    with jax.set_mesh(mesh_of()):
        return np.asarray(all_logits()(tokens_BT)[0, len(ids) - 1, : CFG.vocab_size])


@functools.cache
def together(sampling: Sampling) -> list[list[int]]:
    """The texts of the three prompts in one batch on one device."""
    return ids_of(three_prompts(), sampling)


def alone(prompts, sampling) -> list[list[int]]:
    return [ids_of([prompt], sampling)[0] for prompt in prompts]


def test_temperature_0_takes_the_likeliest_token_each_time() -> None:
    """Ragged prompts in one batch; where the best two are closer than 1e-4, either is the likeliest.

    A full forward pass says so as long as all of a text is in sight.
    """
    for prompt, new in zip(three_prompts(), together(GREEDY), strict=True):
        assert len(new) == GREEDY.max_tokens
        ids = list(prompt.ids)
        for token in new[: SEQ_LEN - len(ids)]:
            logits_V = next_logits(ids)
            assert logits_V[token] >= logits_V.max() - 1e-4
            ids.append(token)


DIVIDED = [{"fsdp": 4}, {"tensor": 4, "data": 2}, {"context": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize(
    "sizes", [{"context": 2, "tensor": 2}, *(pytest.param(m, marks=pytest.mark.slow) for m in DIVIDED)]
)
def test_neither_batch_nor_mesh_changes_a_drawn_text(sizes: dict[str, int]) -> None:
    assert together(DRAWN) == alone(three_prompts(), DRAWN)
    assert ids_of(three_prompts()[::-1], DRAWN) == together(DRAWN)[::-1]
    assert ids_of(three_prompts(), DRAWN, **sizes) == together(DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", DIVIDED)
def test_neither_batch_nor_mesh_changes_the_likeliest_text(sizes: dict[str, int]) -> None:
    assert ids_of(three_prompts()[::-1], GREEDY) == together(GREEDY)[::-1]
    assert ids_of(three_prompts(), GREEDY, **sizes) == together(GREEDY)


def test_samples_of_one_prompt_share_the_reading_and_nothing_else() -> None:
    prompts = [Prompt(three_prompts()[1].ids, row) for row in range(3)]
    texts = ids_of(prompts, DRAWN)
    assert len({tuple(text) for text in texts}) == 3
    assert texts == alone(prompts, DRAWN)
    assert ids_of(prompts, dataclasses.replace(DRAWN, seed=1)) != texts


def test_a_text_longer_than_a_row_looks_back_a_row_whatever_shares_its_batch() -> None:
    texts = together(GREEDY)
    assert [len(text) for text in texts] == [100] * 3
    assert texts[::2] == alone(three_prompts()[::2], GREEDY)
    # A prompt that is longer than a row is read from its last SEQ_LEN ids on.
    longer = Prompt([*three_prompts()[1].ids, *texts[1]], 0)
    assert ids_of([longer], GREEDY) == ids_of([Prompt(longer.ids[-SEQ_LEN:], 0)], GREEDY)


def frequencies(logits_V: np.ndarray, sampling: Sampling, n: int) -> np.ndarray:
    keys_N = jax.random.split(jax.random.key(7), n)
    logits_NV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32)[None], (n, len(logits_V)))
    drawn_N = np.asarray(draw(logits_NV, None, keys_N, sampling))
    return np.bincount(drawn_N, minlength=len(logits_V))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.5, min_p=0.2),
        Sampling(temperature=1.2, top_k=8, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_draws_follow_the_stated_distribution(sampling: Sampling) -> None:
    """A chi-square test of 20,000 draws over 12 tokens, at one in a million."""
    logits_V = np.random.default_rng(5).normal(0, 1.5, 12)
    left = plain(logits_V, sampling)
    n = 20_000
    seen = frequencies(logits_V, sampling, n)
    assert (seen[left == 0] == 0).all()
    expected = left[left > 0] * n
    statistic = float(((seen[left > 0] - expected) ** 2 / expected).sum())
    assert statistic < chdtri(max(len(expected) - 1, 1), 1e-6)
    # The test can fail: a tenth more heat is seen.
    warmer = plain(logits_V, Sampling(temperature=sampling.temperature * 1.3))
    off = warmer[warmer > 0] * n
    assert float(((frequencies(logits_V, sampling, n)[warmer > 0] - off) ** 2 / off).sum()) > chdtri(len(off) - 1, 1e-6)


def plain(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution by its definition, a filter after the other."""
    scaled = logits_V / sampling.temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled)
    if sampling.top_k is not None:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p is not None:
        total = 0.0
        for i in order:
            if total >= sampling.top_p:
                p[i] = 0
            total += p[i]
        p /= p.sum()
    if sampling.min_p is not None:
        p[p < sampling.min_p * p.max()] = 0
        p /= p.sum()
    return p


def test_equal_tokens_are_left_in_together() -> None:
    logits_BV = jnp.array([[1.0, 3.0, 3.0, 2.0]])
    assert np.isfinite(filtered(logits_BV, Sampling(top_k=1))).tolist() == [[False, True, True, False]]
    assert np.isfinite(filtered(logits_BV, Sampling(top_p=1e-6))).tolist() == [[False, True, True, False]]
    assert np.isfinite(filtered(logits_BV, Sampling(top_k=99, top_p=1.0))).all()


def test_a_repetition_penalty_makes_what_is_there_less_likely() -> None:
    logits_BV, seen_BV = jnp.array([[2.0, 1.9, -1.0]]), jnp.array([[True, False, True]])
    keys_B = jax.random.split(jax.random.key(0), 1)
    plain, penalised = (Sampling(repetition_penalty=p, temperature=0.0) for p in (1.0, 1.5))
    assert draw(logits_BV, seen_BV, keys_B, plain).tolist() == [0]
    assert draw(logits_BV, seen_BV, keys_B, penalised).tolist() == [1]


def test_a_characters_bytes_are_held_back_until_it_is_whole(tokenizer) -> None:
    ids = [tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u20ac".encode()]
    text = Text(tokenizer, ())
    assert [text.add([i]) for i in [*ids, ids[0]]] == ["", "", "\u20ac", ""]
    assert text.add([], last=True) == "\ufffd"


def test_stop_strings_end_a_text_however_tokens_cut_them(tokenizer) -> None:
    draws = random.Random(0)
    whole = "def walk(path: str) -> None:\n    print('x')\n\ndef other"
    ids = tokenizer.encode(whole).tolist()
    for stops, expected in [
        (["\n\n"], whole[: whole.index("\n\n")]),
        (["None", "\n\n"], whole[: whole.index("None")]),
        (["nowhere", "other thing"], whole),
        (["", "print('x')\n\n"], whole[: whole.index("print")]),
    ]:
        for _ in range(5):
            text, told, rest = Text(tokenizer, stops), "", list(ids)
            while rest:
                n = draws.randint(1, 4)
                told += text.add(rest[:n])
                assert expected.startswith(told)
                rest = rest[n:]
            assert told + text.add([], last=True) == expected
            assert text.stopped == (expected != whole)


def test_text_ends_where_its_document_does(tokenizer) -> None:
    nats = [-1.0, -2.0, -3.0, 0.0]
    assert generate._piece([9, 10, EOS_ID, 11], nats, done=True, over=False) == ([9, 10], nats[:3], True)
    assert generate._piece([BOS_ID, 11, 12, 13], nats, done=True, over=False) == ([], nats[:1], True)
    assert generate._piece([9, 10, 11, 12], nats, done=False, over=False) == ([9, 10, 11, 12], nats, False)
    assert generate._piece([EOS_ID] * 4, nats, done=True, over=True) == ([], [], True)
    assert prompt_of(tokenizer, "import", 4) == Prompt([BOS_ID, *tokenizer.encode("import").tolist()], 4)


def test_streams_joined_are_the_texts(tokenizer) -> None:
    weights, decoder, mesh = decoder_on(DRAWN, ())
    prompts = [prompt_of(tokenizer, text, row) for row, text in enumerate(("def", "import os", "print(print(pri"))]
    with jax.set_mesh(mesh):
        pieces = list(streams(decoder, weights, tokenizer, prompts))
        texts = continued(decoder, weights, tokenizer, prompts)
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == texts
    assert [tokenizer.decode(ids) for ids in ids_of(prompts, DRAWN)] == texts


def test_a_token_copies_no_cache() -> None:
    """It is written in place, and read as it lies: copies of it once took half of a token's time."""
    weights, decoder, mesh = decoder_on(GREEDY, ())
    with jax.set_mesh(mesh):
        prompts = three_prompts()
        going = generate._begun(decoder, weights, prompts, [p.ids for p in prompts], 16, SEQ_LEN)
        shapes = {tuple(x.addressable_data(0).shape) for pair in going.cache.pairs.values() for x in pair}
        program = decoder.go_on.lower(weights, going, np.int32(16)).compile().as_text()
    for shape in shapes:
        written = f"f32[{','.join(map(str, shape))}]"
        assert "dynamic-update-slice" in program and written in program
        assert not re.findall(rf"{re.escape(written)}\S* (?:copy|transpose)\(", program)
