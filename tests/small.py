"""A model, rows and meshes as small as the proofs allow, and how far apart two results are."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from llm_jax.alphabet import MESH_AXES
from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.mesh import acts, make_mesh
from llm_jax.model.config import ModelConfig
from llm_jax.model.paths import placed
from llm_jax.model.transformer import Transformer, abstract_model, split
from llm_jax.model.weights import summed_as_stored

# Everything that has a number of its own is on; heads and widths are divisible by a tensor axis of 4.
CFG = ModelConfig(
    d_model=16,
    d_ff=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    d_head=4,
    vocab_size=250,
    qk_norm=True,
    logit_soft_cap=20.0,
    attention="chunked",
)
B, U = 8, 33
# What make_step wants to know beside config, objective, optimizer and steps.
WORD_STARTS_V = np.arange(2 * 250).reshape(250, 2) % 3 == 0
SETTINGS: dict[str, Any] = {"cross_documents": False, "seed": 0, "word_starts_V": WORD_STARTS_V}

# XLA's own defaults, for the programs that users run: the suite's others are compiled in half the time (conftest.py).
AS_SHIPPED: dict[str, Any] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if jax.__version_info__ < (0, 11):
    AS_SHIPPED["xla_cpu_use_fusion_emitters"] = True

Tree = Any


def slowly(*values: Any) -> Any:
    """The values of one case of a parametrised test, as a case that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mesh_of(**sizes: int) -> Mesh:
    return make_mesh({axis: sizes.get(axis, 1) for axis in MESH_AXES})


def weights_of(cfg: ModelConfig, seed: int = 0) -> nnx.State:
    """The initial weights as numpy arrays; norms' scales are drawn too, since ones would hide where they go."""
    # Neither changes what is drawn.
    return _weights_of(cfg.model_copy(update={"attention": "xla", "remat": "none"}).model_dump_json(), seed)


@functools.cache
def _weights_of(json: str, seed: int) -> nnx.State:
    cfg = ModelConfig.model_validate_json(json)
    with jax.set_mesh(mesh_of()):
        init = jax.jit(lambda key: split(Transformer(cfg, nnx.Rngs(params=key))).params)
        params = jax.device_get(init(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x if np.ptp(x) else x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)


def put_weights(params: nnx.State, cfg: ModelConfig, mesh: Mesh) -> nnx.State:
    """Numpy weights, sharded as the model's."""
    with jax.set_mesh(mesh):
        shapes = placed(abstract_model(cfg)[1], mesh)
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), params, shapes)


def put(array: np.ndarray, letters: str, mesh: Mesh) -> Array:
    return jax.device_put(array, NamedSharding(mesh, acts(letters)))


def packed_row(rng: np.random.Generator, *lengths: int, first: int = 0, width: int = U, vocab: int = 250) -> np.ndarray:
    """int32 [width]: `first` tokens of an earlier row's document, documents of these lengths (with BOS), padding."""
    row = np.full(width, PAD_ID, np.int32)
    row[:first] = rng.integers(BOS_ID + 1, vocab, first)
    at = first
    for length in lengths:
        row[at] = BOS_ID
        row[at + 1 : at + length] = rng.integers(BOS_ID + 1, vocab, length - 1)
        at += length
    assert at <= width
    return row


def plain_rows(seed: int) -> np.ndarray:
    """int32 [B, U] without a border or padding."""
    rng = np.random.default_rng(seed)
    return np.stack([packed_row(rng, first=U) for _ in range(B)])


def ragged_rows(seed: int) -> np.ndarray:
    """int32 [B, U] in which rows weigh 0 to 32 tokens, so that parts of the batch weigh very differently."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            packed_row(rng, 4),
            packed_row(rng),
            packed_row(rng, first=U),
            packed_row(rng, 5, 7, 21),
            packed_row(rng, *[2] * 16),
            packed_row(rng, 10, 11),
            packed_row(rng, 33),
            packed_row(rng, 9, 5, first=17),
        ]
    )


def deviation(gradient: Tree, reference: Tree) -> float:
    """The largest difference of the worst leaf, as a share of its largest value; of a thousandth of the largest leaf's,
    if that is more. A value that is not finite is infinitely wrong."""
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True))
    if not all(np.all(np.isfinite(g)) for g, _ in pairs):
        return float("inf")
    scales = [float(np.max(np.abs(g0))) for _, g0 in pairs]
    differences = [float(np.max(np.abs(np.asarray(g) - np.asarray(g0)))) for g, g0 in pairs]
    return max(d / max(own, 1e-3 * max(scales)) for d, own in zip(differences, scales, strict=True))


def forgets(axis: str) -> Callable[[Array, str], Array]:
    """summed_as_stored, but not over this axis."""

    def summed(part: Array, letters: str) -> Array:
        psum = jax.lax.psum
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "psum", lambda x, axes: psum(x, tuple(a for a in axes if a != axis)))
            return summed_as_stored(part, letters)

    return summed
