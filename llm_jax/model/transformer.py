"""The decoder: a vocabulary-parallel embedding, layers under one scan, a final norm and the output head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llm_jax.mesh import acts, gathered
from llm_jax.model.config import ModelConfig
from llm_jax.model.layers import Block, angles, rematerialised, rms_norm
from llm_jax.model.moe import Routing
from llm_jax.model.weights import Balance, Weight, matrix, scale_vector, use


class Transformer(nnx.Module):
    """The model as an immutable tree of weights; layers are stacked in front (L)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.embed = matrix("VD", cfg, rngs, fan_in="D")
        keys_L = jax.random.split(rngs.params(), cfg.n_layers)
        self.layers = jax.vmap(lambda key: Block(cfg, nnx.Rngs(params=key)))(keys_L)
        self.norm = scale_vector("D", cfg)
        if not cfg.tied_embeddings:
            self.unembed = matrix("VD", cfg, rngs, fan_in="D")

    def __call__(
        self, tokens_BT: Array, segments_BT: Array, positions_BT: Array, cfg: ModelConfig, *, causal: bool = True
    ) -> tuple[Array, dict[str, Routing]]:
        """The last hidden states x_BTD in the compute type, and what the routers did, by the name of the layers' place.

        int32 inputs, one segment number a document.
        """
        by = angles(positions_BT, cfg)

        def one_layer(x_BTD: Array, layer: Block) -> tuple[Array, None]:
            return layer(x_BTD, segments_BT, by, cfg, causal=causal), None

        x_BTD = look_up(self.embed, tokens_BT).astype(cfg.compute_dtype)
        x_BTD, _ = jax.lax.scan(rematerialised(one_layer, cfg), x_BTD, self.layers, unroll=cfg.unroll)
        return rms_norm(x_BTD, self.norm, cfg.norm_eps), {}

    def head(self, cfg: ModelConfig) -> Array:
        """The output head unembed_VD in the compute type, V sharded over tensor, D whole; padded rows included."""
        return use(self.embed if cfg.tied_embeddings else self.unembed, cfg).astype(cfg.compute_dtype)


# The trained parameters and the routers' choice biases: all that a forward pass reads.
Weights = tuple[nnx.State, nnx.State]


class Parts(NamedTuple):
    """A model taken apart: nnx.merge(graph, *weights) is the model again."""

    graph: nnx.GraphDef
    params: nnx.State
    """What is trained."""
    balance: nnx.State
    """The routers' choice biases; empty without experts or model.moe.balance_rate."""


def split(model: Transformer) -> Parts:
    """The model's structure, its parameters, and the rest of its state."""
    return Parts(*nnx.split(model, nnx.Param, Balance))


def abstract_model(cfg: ModelConfig) -> Parts:
    """The model in parts, its arrays as shapes with shardings; needs a mesh, allocates nothing."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: split(Transformer(cfg, nnx.Rngs(params=key))), key)


def look_up(table: Weight, tokens_BT: Array) -> Array:
    """Rows of a table that is sharded over its vocabulary; float32, since many gradients add up in one row."""

    def local(table_VD: Array, tokens_BT: Array) -> Array:
        V = table_VD.shape[0]
        row_BT = tokens_BT - jax.lax.axis_index("tensor") * V
        mine_BT = (row_BT >= 0) & (row_BT < V)
        x_BTD = table_VD.at[row_BT].get(mode="clip") * mine_BT[..., None]
        return jax.lax.psum(x_BTD, "tensor")

    table_VD = jax.reshard(table[...], gathered(table.letters))
    return jax.shard_map(local, in_specs=(gathered("VD"), acts("BT")), out_specs=acts("BTD"))(table_VD, tokens_BT)


def logits(model: Transformer, x_BTD: Array, cfg: ModelConfig) -> Array:
    """Float32 logits_BTV of hidden states; the padded vocabulary is masked."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, model.head(cfg), preferred_element_type=jnp.float32)
    logits_BTV = soft_cap(logits_BTV, cfg.logit_soft_cap)
    v_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=jax.typeof(logits_BTV).sharding)
    return jnp.where(v_BTV < cfg.vocab_size, logits_BTV, -jnp.inf)


def soft_cap(logits: Array, cap: float | None) -> Array:
    """cap * tanh(logits / cap); the logits themselves for None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
