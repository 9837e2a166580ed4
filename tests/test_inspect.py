"""What is seen inside is what the model computes: logits, shares, nats, lens and choices; on any mesh."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.data.config import BOS_ID, MASK_ID
from llm_jax.eval import inside
from llm_jax.eval.inside import Inside, look_inside, spoken, walked
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.requests import Pair, log_likelihoods
from llm_jax.eval.scorer import make_score, on_mesh
from llm_jax.model import decode
from llm_jax.model.attention import attention
from llm_jax.model.backends import resolve
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.layers import sight_of
from llm_jax.model.sight import Places
from llm_jax.model.transformer import Weights, abstract_model, angles_by_theta, logits
from tests.bigram import config_of, drawn_table, log_softmax, weights_for
from tests.small import CFG, mesh_of

T = 24
N = 17  # tokens of a text; the rest of its row is padding
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "windows": {"n_layers": 3, "period": (LayerConfig(window=5), LayerConfig()), "attention_soft_cap": 2.0},
    "blocks": {"n_layers": 2, "global_tokens": 2, "period": (LayerConfig(block=8, rope_theta=100.0), LayerConfig())},
    "experts": {
        "period": (LayerConfig(moe=True), LayerConfig()),
        "moe": MoeConfig(experts=4, top_k=2, d_ff=16, shared_d_ff=16, scores="sigmoid", balance_rate=0.1),
        "norm_place": "sandwich",
    },
    "bert": {
        "learned_positions": 32,
        "qk_norm": False,
        "attention_sinks": True,
        "norm_place": "post",
        "norm": "layernorm",
        "bias": "all",
        "mlp": "gelu",
        "tied_embeddings": True,
        "token_types": 2,
        "embedding_norm": True,
        "head_transform": True,
        "output_bias": True,
    },
}
# The others are slow: programs of their own, for the same lines.
ORDINARY = (("windows", True), ("blocks", False), ("experts", True), ("bert", False))
EVERY = [
    pytest.param(kind, causal, marks=() if (kind, causal) in ORDINARY else pytest.mark.slow)
    for kind in KINDS
    for causal in (True, False)
]


def cfg_of(kind: str) -> ModelConfig:
    return resolve(decode.unrolled(CFG.model_copy(update=KINDS[kind])), "cpu", 1)


@functools.cache
def weights_of(kind: str) -> Any:
    """Numpy weights, all of them drawn: what is zero or one would hide where it goes."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of()):
        _, *abstract = abstract_model(cfg_of(kind))
    return jax.tree.map(lambda x: rng.normal(float(x.ndim == 1), 0.3, x.shape).astype(x.dtype), tuple(abstract))


def put(weights: Weights, cfg: ModelConfig) -> Weights:
    """On the mesh that is set."""
    _, *abstract = abstract_model(cfg)
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), weights, tuple(abstract)
    )


def text(n: int, seed: int = 0) -> list[int]:
    return [BOS_ID, *np.random.default_rng(seed).integers(5, CFG.vocab_size, n - 1).tolist()]


class Both(NamedTuple):
    """One row by the model itself, and what was seen in it."""

    logits_TV: np.ndarray
    seen_TV: np.ndarray
    shares: list[np.ndarray]
    """[H, T, T] of each layer."""
    outputs: list[np.ndarray]
    """Attention's own o_THC of each layer."""
    values: list[np.ndarray]
    """v_TKC of each layer."""
    experts: list[np.ndarray]
    seen_experts: list[np.ndarray]


def both(kind: str, causal: bool) -> Both:
    cfg, ids = cfg_of(kind), np.pad(np.array(text(N), np.int32), (0, T - N))

    @jax.jit
    def run(weights: Weights, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array) -> tuple:
        model = nnx.merge(abstract_model(cfg).graph, *weights)
        x_BTD, routing = model(tokens_BT, segments_BT, positions_BT, cfg, causal=causal)
        seen = walked(model, tokens_BT, segments_BT, positions_BT, cfg, causal=causal)
        here, by_theta = Places(segments_BT, positions_BT), angles_by_theta(positions_BT, cfg)
        outputs, values = [], []
        for before_BTD, (_, block, layer) in zip(seen.streams, decode.layers_of(model, cfg), strict=False):
            x = before_BTD if block.attention_norm is None else block.attention_norm(before_BTD, cfg)
            q, k, v = block.attention.projected(x, by_theta.get(layer.rope_theta or cfg.rope_theta), cfg)
            sinks_H = None if block.attention.sinks is None else block.attention.sinks[...]
            sight, cap = sight_of(layer, cfg, causal=causal), cfg.attention_soft_cap
            o = attention(q, k, v, here, here, sight=sight, soft_cap=cap, sinks_H=sinks_H, backend="chunked")
            outputs.append(o[0])
            values.append(v[0])
        return (
            logits(model, x_BTD, cfg)[0],
            spoken(model, seen.streams[-1], cfg)[0],
            [shares_BKGTS[0].reshape(-1, T, T) for shares_BKGTS in seen.shares],
            outputs,
            values,
            [of.experts_LBTX[0, 0] for of in routing.values()],
            [of.experts_LBTX[0] for of in seen.routing.values()],
        )

    place_BT = np.arange(T, dtype=np.int32)[None]
    with jax.set_mesh(mesh_of()):
        segments_BT = np.where(place_BT < N, 1, -1).astype(np.int32)
        return Both(*jax.device_get(run(put(weights_of(kind), cfg), *map(on_mesh, (ids[None], segments_BT, place_BT)))))


def sees(layer: LayerConfig, t: int, s: int, *, causal: bool, global_tokens: int) -> bool:
    """Who sees whom, told anew."""
    if causal and s > t:
        return False
    if layer.window is not None:
        return t - s < layer.window if causal else abs(t - s) <= layer.window // 2
    if layer.block is not None:
        return t // layer.block == s // layer.block or min(t, s) < global_tokens
    return True


@pytest.mark.parametrize(("kind", "causal"), EVERY)
def test_what_is_seen_is_what_the_model_computes(kind: str, causal: bool) -> None:
    cfg, one = cfg_of(kind), both(kind, causal)
    scale = np.abs(one.logits_TV[:N, : cfg.vocab_size]).max()
    np.testing.assert_allclose(one.seen_TV[:N], one.logits_TV[:N], atol=1e-5 * scale, rtol=0)
    for layer, shares_HTS, o_THC, v_SKC in zip(cfg.layers, one.shares, one.outputs, one.values, strict=True):
        for t, s in np.ndindex(N, T):
            seen = s < N and sees(layer, t, s, causal=causal, global_tokens=cfg.global_tokens)
            assert np.all(shares_HTS[:, t, s] > 0) if seen else np.all(shares_HTS[:, t, s] == 0), (t, s)
        sums_HT = shares_HTS[:, :N].sum(axis=-1)
        if cfg.attention_sinks:
            assert np.all(sums_HT < 1)
        else:
            np.testing.assert_allclose(sums_HT, 1, atol=1e-6)
        v_SHC = np.repeat(v_SKC, shares_HTS.shape[0] // v_SKC.shape[1], axis=1)
        np.testing.assert_allclose(np.einsum("hts,shc->thc", shares_HTS, v_SHC)[:N], o_THC[:N], atol=1e-5)
    assert len(one.experts) == len(one.seen_experts) == cfg.n_moe_layers
    for ours, theirs in zip(one.seen_experts, one.experts, strict=True):
        np.testing.assert_array_equal(ours[:N], theirs[:N])


def test_a_walk_that_forgot_a_window_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "sight_of", lambda layer, cfg, causal: sight_of(LayerConfig(), cfg, causal=causal))
    one = both("windows", causal=True)
    assert np.abs(one.seen_TV[:N, :250] - one.logits_TV[:N, :250]).max() > 1e-3


def look(kind: str, *, causal: bool, batch_rows: int = 8, **sizes: int) -> Inside:
    cfg = cfg_of(kind)
    with jax.set_mesh(mesh_of(**sizes)):
        seen = look_inside(put(weights_of(kind), cfg), cfg, text(N), causal=causal, batch_rows=batch_rows)
    assert seen is not None
    return seen


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_neither_mesh_nor_batch_matters(causal: bool) -> None:
    alone = look("experts", causal=causal, batch_rows=16)
    other = look("experts", causal=causal, tensor=2, expert=2)
    assert alone.chosen.keys() == other.chosen.keys() == {0}
    np.testing.assert_array_equal(alone.chosen[0].experts_TX, other.chosen[0].experts_TX)
    for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(other), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    gates_TX = alone.chosen[0].gates_TX
    assert gates_TX.shape == (N, 2) and np.all(gates_TX > 0)
    np.testing.assert_allclose(gates_TX.sum(axis=1), 1, atol=1e-6)


def test_losses_are_the_scorers_and_the_lens_ends_at_the_output() -> None:
    kind, ids = "windows", text(N)
    cfg, seen = cfg_of(kind), look("windows", causal=True)
    with jax.set_mesh(mesh_of()):
        pairs = [Pair(ids[:n], ids[n : n + 1]) for n in range(1, N)]
        weights = put(weights_of(kind), cfg)
        scores = log_likelihoods(make_score(cfg), weights, pairs, seq_len=64, batch_rows=4)
    assert scores is not None
    np.testing.assert_allclose(-seen.guesses.nats_N, [score.log_likelihood for score in scores], atol=1e-5)
    assert (seen.guesses.rank_N == 1).tolist() == [score.greedy for score in scores]
    np.testing.assert_array_equal(seen.lens_LT[-1, :-1], seen.guesses.best_NX[:, 0])
    np.testing.assert_allclose(seen.lens_probabilities_LT[-1, :-1], seen.guesses.probabilities_NX[:, 0], rtol=1e-5)
    assert seen.lens_LT.shape == (cfg.n_layers + 1, N)
    assert seen.shares_LHTS.shape == (cfg.n_layers, cfg.n_heads, N, N)


def test_a_masked_models_losses_are_a_plain_loops() -> None:
    kind, ids = "bert", text(N)
    cfg, seen = cfg_of(kind), look("bert", causal=False)
    with jax.set_mesh(mesh_of()):
        graph, weights = abstract_model(cfg).graph, put(weights_of(kind), cfg)

        @jax.jit
        def alone(weights: Weights, tokens_BT: jax.Array) -> jax.Array:
            model, place_BT = nnx.merge(graph, *weights), jnp.arange(N)[None]
            x_BTD, _ = model(tokens_BT, jnp.zeros_like(tokens_BT), place_BT, cfg, causal=False)
            return jax.nn.log_softmax(logits(model, x_BTD, cfg)[0])

        for place in range(1, N):
            hidden = np.array([[*ids[:place], MASK_ID, *ids[place + 1 :]]], np.int32)
            log_V = np.asarray(alone(weights, on_mesh(hidden)))[place]
            assert seen.guesses.nats_N[place - 1] == pytest.approx(-log_V[ids[place]], abs=1e-5)
            assert seen.guesses.rank_N[place - 1] == 1 + (log_V > log_V[ids[place]]).sum()
            assert seen.guesses.best_NX[place - 1].tolist() == np.argsort(-log_V, kind="stable")[:5].tolist()


def test_of_a_bigram_model_everything_is_known() -> None:
    table = drawn_table(20)
    cfg = resolve(decode.unrolled(config_of(20)), "cpu", 1)
    ids = [BOS_ID, *np.random.default_rng(0).integers(5, 20, 9).tolist()]
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2)):
        seen = look_inside(put((weights_for(table), nnx.State({})), cfg), cfg, ids, causal=True, batch_rows=8)
    assert seen is not None
    log_VV = log_softmax(table)
    np.testing.assert_allclose(seen.guesses.nats_N, -log_VV[ids[:-1], ids[1:]], rtol=1e-5)
    ranks = [1 + int((table[a] > table[a, b]).sum()) for a, b in itertools.pairwise(ids)]
    assert seen.guesses.rank_N.tolist() == ranks
    # Its layers are zeros: each says what the embedding says, and a query reads all that it sees alike.
    for lens_T, probability_T in zip(seen.lens_LT, seen.lens_probabilities_LT, strict=True):
        assert lens_T.tolist() == table[ids].argmax(axis=1).tolist()
        np.testing.assert_allclose(probability_T, np.exp(log_VV[ids].max(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(seen.shares_LHTS[0, 0], np.tri(10) / np.arange(1, 11)[:, None], atol=1e-6)


def test_of_equal_tokens_the_lowest_id_comes_first() -> None:
    cfg = resolve(decode.unrolled(config_of(20)), "cpu", 1)
    weights = (weights_for(np.zeros((20, 20), np.float32)), nnx.State({}))
    with jax.set_mesh(mesh_of()):
        seen = look_inside(put(weights, cfg), cfg, [BOS_ID, 7, 0], causal=True, batch_rows=1)
    assert seen is not None and seen.guesses.rank_N.tolist() == [8, 1]
    assert seen.guesses.best_NX.tolist() == [[0, 1, 2, 3, 4]] * 2
    np.testing.assert_allclose(seen.guesses.nats_N, np.log(20), rtol=1e-6)


def test_broken_weights_are_told_and_a_stop_is_heeded() -> None:
    cfg = resolve(decode.unrolled(config_of(20)), "cpu", 1)
    weights = (jax.tree.map(lambda x: np.full_like(x, np.nan), weights_for(drawn_table(20))), nnx.State({}))
    with jax.set_mesh(mesh_of()):
        with pytest.raises(NotFinite, match=r"^2 of 2 tokens have a loss that is not a number: the weights are broken"):
            look_inside(put(weights, cfg), cfg, [BOS_ID, 7, 0], causal=True, batch_rows=1)
        for answers in ([True], [False, True]):
            stop = iter(answers)
            asked = look_inside(
                put(weights, cfg), cfg, [BOS_ID, 7], causal=False, batch_rows=1, stop=lambda stop=stop: next(stop)
            )
            assert asked is None
