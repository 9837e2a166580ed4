"""A transformer that is exactly a bigram table: what its answers have to be is a sum over a table."""

import functools

import jax
import numpy as np
from flax import nnx

from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import abstract_model
from tests.small import mesh_of


def config_of(vocab_size: int) -> ModelConfig:
    """A channel for each token, so that any table of logits can be had, beside next to nothing."""
    return ModelConfig(
        d_model=-(-vocab_size // 8) * 8,
        d_ff=8,
        n_layers=1,
        n_heads=8,
        n_kv_heads=4,
        d_head=2,
        vocab_size=vocab_size,
        attention="chunked",
    )


def weights_for(logits_VV: np.ndarray) -> nnx.State:
    """config_of's weights, under which the logits after token v are logits_VV[v], as numpy arrays."""
    cfg = config_of(len(logits_VV))
    # Layers of zeros add nothing; of an embedding that is one channel alone, the norm makes sqrt(D) in this channel.
    with jax.set_mesh(mesh_of()):
        params = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), abstract_model(cfg).params)
    V, D = len(logits_VV), cfg.d_model
    embed_VD, unembed_VD = np.zeros((2, cfg.padded_vocab_size, D), np.float32)
    embed_VD[np.arange(V), np.arange(V)] = 1000.0
    unembed_VD[:V, :V] = logits_VV.T / np.sqrt(D)
    arrays = {"embed": embed_VD, "unembed": unembed_VD, "norm.scale": np.ones(D, np.float32)}

    def set_to(path: tuple, zeros: np.ndarray) -> np.ndarray:
        return arrays.get(jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), zeros)

    return jax.tree_util.tree_map_with_path(set_to, params)


@functools.cache
def drawn_table(vocab_size: int, seed: int = 0) -> np.ndarray:
    """float32 logits [V, V] in which no two of a row are close; ids below 5, which no text has, are never likely."""
    rng = np.random.default_rng(seed)
    logits_VV = np.stack([rng.permutation(vocab_size) for _ in range(vocab_size)]).astype(np.float32)
    logits_VV *= 8 / vocab_size
    logits_VV[:, :5] -= 20
    return logits_VV


def log_softmax(logits_VV: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted_VV = logits_VV.astype(np.float64) - logits_VV.max(1, keepdims=True)
    return shifted_VV - np.log(np.exp(shifted_VV).sum(1, keepdims=True))
