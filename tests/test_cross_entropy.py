"""The fused, chunked, vocabulary-parallel cross-entropy is the one that a textbook writes down, gradient included."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, P
from jax.sharding import Mesh, NamedSharding

from llm_jax.alphabet import ROW_AXES
from llm_jax.mesh import weights as stored
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Head
from llm_jax.objective import cross_entropy
from llm_jax.objective.cross_entropy import cross_entropy_sums, token_scores
from tests.small import CFG, mesh_of, put

B, T, D = 8, 16, 16
MESHES = {
    "one": {},
    "tensor 4 x fsdp 2": {"tensor": 4, "fsdp": 2},
    "context 2 x fsdp 2 x tensor 2": {"context": 2, "fsdp": 2, "tensor": 2},
    "data 4 x expert 2": {"data": 4, "expert": 2},
}
CAPPED = CFG.model_copy(update={"logit_soft_cap": 5.0, "output_bias": True})
PLAIN = CFG.model_copy(update={"logit_soft_cap": None, "vocab_size": 256})


def inputs(cfg: ModelConfig) -> tuple[np.ndarray, ...]:
    """Hidden states, targets, ragged weights, head, bias; the head's padded rows hold numbers that must not count."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(cfg.padded_vocab_size, D)).astype(np.float32)
    targets = rng.integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) < np.linspace(0, 1, B)[:, None]).astype(np.float32) * rng.integers(1, 3, (B, T))
    bias = rng.normal(size=cfg.padded_vocab_size).astype(np.float32) * cfg.output_bias
    return x, targets, weights.astype(np.float32), head, bias


def naive(cfg: ModelConfig, z_loss: float) -> list[np.ndarray]:
    """total, nll, squared log-normaliser and correct summed, and the gradients of x, head, bias, in float64 by hand."""
    targets = inputs(cfg)[1]
    x, _, weights, head, bias = (a.astype(np.float64) for a in inputs(cfg))
    logits = x @ head[: cfg.vocab_size].T + bias[: cfg.vocab_size]
    slope = np.ones_like(logits)
    if cfg.logit_soft_cap:
        logits = cfg.logit_soft_cap * np.tanh(logits / cfg.logit_soft_cap)
        slope = 1 - (logits / cfg.logit_soft_cap) ** 2
    top = logits.max(-1, keepdims=True)
    log_z = (np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top)[..., 0]
    hit = np.eye(cfg.vocab_size)[targets]
    nll = log_z - (logits * hit).sum(-1)
    share = np.exp(logits - log_z[..., None])
    d_logits = weights[..., None] * slope * (share * (1 + 2 * z_loss * log_z)[..., None] - hit)
    d_head, d_bias = np.zeros((cfg.padded_vocab_size, D)), np.zeros(cfg.padded_vocab_size)
    d_head[: cfg.vocab_size] = np.einsum("btv,btd->vd", d_logits, x)
    d_bias[: cfg.vocab_size] = np.sum(d_logits, (0, 1))
    sums = [np.sum(weights * part) for part in (nll, log_z**2, logits.argmax(-1) == targets)]
    of_bias = [d_bias] if cfg.output_bias else []
    return [sums[0] + z_loss * sums[1], *sums, d_logits @ head[: cfg.vocab_size], d_head, *of_bias]


def fused(cfg: ModelConfig, z_loss: float, mesh: dict[str, int], scale: float = 1.0) -> list[np.ndarray]:
    """The same of the real thing; with `scale` the gradients are those of scale * total, and divided by it again."""
    devices = mesh_of(**mesh)
    x, targets, weights, *of_head = inputs(cfg)

    def with_gradients(x: Array, targets: Array, weights: Array, head: Head) -> tuple[Array, ...]:
        def total(x: Array, head: Head) -> tuple[Array, tuple[Array, cross_entropy.Sums]]:
            value, parts = cross_entropy_sums(x, head, targets, weights, cfg, z_loss)
            return scale * value, (value, parts)

        gradients, (value, parts) = jax.grad(total, (0, 1), has_aux=True)(x, head)
        without_gradient, _ = cross_entropy_sums(x, head, targets, weights, cfg, z_loss)
        return value, *parts, *(g / scale for g in jax.tree.leaves(gradients)), without_gradient

    with jax.set_mesh(devices):
        placed = put(x, "BTD", devices), put(targets, "BT", devices), put(weights, "BT", devices)
        function = jax.jit(with_gradients)
        *results, without_gradient = jax.device_get(function(*placed, put_head(cfg, devices, *of_head)))
    np.testing.assert_allclose(without_gradient, results[0], rtol=1e-6)
    return results


def put_head(cfg: ModelConfig, mesh: Mesh, head: np.ndarray, bias: np.ndarray) -> Head:
    head_VD = jax.device_put(head, NamedSharding(mesh, stored("VD")))
    return Head(head_VD, jax.device_put(bias, NamedSharding(mesh, P("tensor"))) if cfg.output_bias else None)


def wrongness(cfg: ModelConfig, z_loss: float, mesh: dict[str, int], scale: float = 1.0) -> float:
    """The worst of the sums' and gradients' differences, each as a share of its largest value."""
    pairs = zip(fused(cfg, z_loss, mesh, scale), naive(cfg, z_loss), strict=True)
    return max(float(np.max(np.abs(got - expected)) / np.max(np.abs(expected))) for got, expected in pairs)


@pytest.mark.parametrize("mesh", MESHES)
def test_fused_is_naive_with_everything_on(mesh):
    assert wrongness(CAPPED, 0.1, MESHES[mesh], scale=0.01) < 2e-6


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_fused_is_naive_without_a_cap_and_without_padding(z_loss):
    assert wrongness(PLAIN, z_loss, {}) < 2e-6


@pytest.mark.parametrize("mesh", [{}, {"context": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("limit", [16 * 64, 1])
def test_chunks_change_nothing(limit, mesh):
    assert wrongness(CAPPED.model_copy(update={"logit_chunk": limit}), 0.1, mesh) < 2e-6


def test_chunks_divide_the_tokens_and_hold_to_the_limit_where_a_divisor_does():
    limit = 2**21
    cfg = CFG.model_copy(update={"logit_chunk": limit})
    for tokens in (1, 7, 128, 3 * 256, 4096, 3 * 5 * 7 * 512, 65536):
        for vocabulary in (128, 4096, 131072):
            chunks = cross_entropy._chunk_count(tokens, vocabulary, cfg)
            assert tokens % chunks == 0
            assert tokens // chunks * vocabulary <= limit
            divisors = [n for n in range(1, chunks) if tokens % n == 0]
            assert all(tokens // n * vocabulary > limit for n in divisors)
    assert cross_entropy._chunk_count(8, vocabulary, cfg.model_copy(update={"logit_chunk": 1})) == 8


def scores(
    mesh: dict[str, int],
    x: np.ndarray,
    head: np.ndarray,
    targets: np.ndarray,
    cfg: ModelConfig,
    bias: np.ndarray | None = None,
):
    devices = mesh_of(**mesh)
    with jax.set_mesh(devices):
        placed = put_head(cfg, devices, head, np.zeros(len(head), np.float32) if bias is None else bias)
        arguments = put(x, "BTD", devices), placed, put(targets, "BT", devices)
        return jax.device_get(scoring(cfg.model_dump_json())(*arguments))


@functools.cache
def scoring(json: str) -> Callable[[Array, Head, Array], tuple[Array, Array]]:
    """token_scores for a config as JSON, compiled once a mesh."""
    cfg = ModelConfig.model_validate_json(json)
    return jax.jit(lambda x, head, targets: token_scores(x, head, targets, cfg))


@pytest.mark.parametrize("mesh", MESHES)
def test_token_scores_add_up_to_the_sums(mesh):
    x, targets, weights, head, bias = inputs(CAPPED)
    nll, correct = scores(MESHES[mesh], x, head, targets, CAPPED.model_copy(update={"logit_chunk": 16 * 64}), bias)
    expected = naive(CAPPED, 0.0)
    np.testing.assert_allclose(np.sum(nll * weights), expected[1], rtol=2e-6)
    assert np.sum(correct * weights) == expected[3]
    assert nll.shape == correct.shape == (B, T)


@pytest.mark.parametrize("mesh", MESHES)
def test_of_equal_logits_the_lowest_id_is_the_guess(mesh):
    """Ties inside one part of the vocabulary, across parts, and of all ids but padding."""
    x = np.ones((B, T, D), np.float32)
    ties = {0: (3, 5, 200), 1: (70, 249), 2: (130, 131)}
    for ids in ties.values():
        head = np.zeros((256, D), np.float32)
        head[list(ids)] = 1
        head[250:] = 9
        for target, right in [(ids[0], 1), (ids[1], 0), (0, 0)]:
            _, correct = scores(
                MESHES[mesh], x, head, np.full((B, T), target, np.int32), PLAIN.model_copy(update={"vocab_size": 250})
            )
            assert (correct == right).all()
    _, correct = scores(MESHES[mesh], x, np.zeros((256, D), np.float32), np.zeros((B, T), np.int32), CFG)
    assert correct.all()


def test_logits_far_apart_stay_finite():
    x = np.full((B, T, D), 30.0, np.float32)
    head = np.linspace(-30, 30, 256, dtype=np.float32)[:, None] * np.ones((1, D), np.float32)
    nll, _ = scores({"tensor": 4}, x, head, np.zeros((B, T), np.int32), PLAIN)
    np.testing.assert_allclose(nll, 60 * 30 * D, rtol=1e-5)


def test_padding_of_the_vocabulary_gets_no_share_and_no_gradient():
    results = fused(CAPPED, 0.1, {"tensor": 2, "data": 4})
    for of_head in results[-2:]:
        assert of_head[: CFG.vocab_size].any() and not of_head[CFG.vocab_size :].any()


# Planted defects.


def padding_counts(monkeypatch):
    real = cross_entropy._local_logits
    unpadded = {"vocab_size": CFG.padded_vocab_size}
    monkeypatch.setattr(
        cross_entropy, "_local_logits", lambda x, w, b, cfg: real(x, w, b, cfg.model_copy(update=unpadded))
    )


def cap_without_slope(monkeypatch):
    real = cross_entropy._local_logits
    monkeypatch.setattr(cross_entropy, "_local_logits", lambda *a: (real(*a)[0], jnp.ones((1, 1), jnp.float32)))


def vocabulary_not_summed(monkeypatch):
    real = cross_entropy._vocabulary_sums

    def defective(logits: Array, targets: Array):
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "psum", lambda x, axes: x)
            return real(logits, targets)

    monkeypatch.setattr(cross_entropy, "_vocabulary_sums", defective)


def gradient_of_x_not_summed(monkeypatch):
    psum = jax.lax.psum

    def forgetful(x: Array, axes: str | tuple[str, ...]) -> Array:
        return x if axes == "tensor" and x.ndim == 2 else psum(x, axes)

    monkeypatch.setattr(jax.lax, "psum", forgetful)


def bias_of_the_own_tokens(monkeypatch):
    """The bias's gradient misses other devices' tokens."""
    psum = jax.lax.psum

    def forgetful(x: Array, axes: str | tuple[str, ...]) -> Array:
        return x if axes == ROW_AXES and x.shape != (3,) else psum(x, axes)  # three are the sums

    monkeypatch.setattr(jax.lax, "psum", forgetful)


def guess_of_the_own_part(monkeypatch):
    real = cross_entropy._vocabulary_sums

    def defective(logits: Array, targets: Array):
        part = real(logits, targets)
        mine = (part.target_N >= 0) & (part.target_N < logits.shape[1])
        own = (jnp.max(logits, axis=1) == part.picked_N) & mine
        return part._replace(correct_N=jax.lax.psum(own.astype(jnp.float32), "tensor"))

    monkeypatch.setattr(cross_entropy, "_vocabulary_sums", defective)


@pytest.mark.parametrize(
    "plant",
    [
        padding_counts,
        cap_without_slope,
        vocabulary_not_summed,
        gradient_of_x_not_summed,
        bias_of_the_own_tokens,
        guess_of_the_own_part,
    ],
)
def test_planted_defect_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    assert wrongness(CAPPED, 0.1, {"tensor": 4, "fsdp": 2}) > 1e-4
