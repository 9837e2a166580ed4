"""A decoder or encoder in JAX alone, as one would write it first, for peers_jax.py: nothing is tuned.

RMSNorm, rotary positions, SwiGLU or experts, and JAX's own attention; layers come one after the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sizes import NOT_PREDICTED, TOP, Sizes

Tree = Any


def drawn(key: Array, s: Sizes) -> Tree:
    """The first weights."""
    keys = iter(jax.random.split(key, 2 + 8 * s.layers))

    def normal(*shape: int) -> Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    def layer() -> Tree:
        experts = (s.experts,) if s.experts else ()
        return {
            "before_attention": jnp.ones(s.d),
            "before_mlp": jnp.ones(s.d),
            "qkv": normal(s.d, 3, s.heads, s.d // s.heads),
            "out": normal(s.heads, s.d // s.heads, s.d),
            "gate": normal(*experts, s.d, s.ff),
            "up": normal(*experts, s.d, s.ff),
            "down": normal(*experts, s.ff, s.d),
            "router": normal(s.d, s.experts),
        }

    layers = [layer() for _ in range(s.layers)]
    return {"embedding": normal(s.vocab, s.d), "layers": layers, "norm": jnp.ones(s.d), "head": normal(s.d, s.vocab)}


def rms_norm(x: Array, scale: Array) -> Array:
    """Root mean square 1, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def rotary(x_BTHC: Array) -> Array:
    """Pairs of channels turned by their position."""
    _, T, _, C = x_BTHC.shape
    angles = np.outer(np.arange(T), 10000.0 ** -(np.arange(0, C, 2) / C))[:, None]
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    a, b = jnp.split(x_BTHC, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x_BTHC.dtype)


def chosen_alone(x_ND: Array, layer: Tree) -> Array:
    """Two experts for each token, none dropped: tokens in the experts' order, and one grouped product each."""
    gate_NX, expert_NX = routed(x_ND, layer)
    order = jnp.argsort(expert_NX.ravel())
    token = order // TOP
    sizes = jnp.bincount(expert_NX.ravel(), length=layer["router"].shape[-1]).astype(jnp.int32)
    gathered = x_ND[token]
    hidden = jax.nn.silu(jax.lax.ragged_dot(gathered, layer["gate"], sizes))
    hidden = hidden * jax.lax.ragged_dot(gathered, layer["up"], sizes)
    out = jax.lax.ragged_dot(hidden, layer["down"], sizes) * gate_NX.ravel()[order, None]
    return jnp.zeros_like(x_ND).at[token].add(out)


def all_of_them(x_ND: Array, layer: Tree) -> Array:
    """Every expert on every token; those that it did not choose count nothing."""
    gate_NX, expert_NX = routed(x_ND, layer)
    share_NE = jnp.zeros((len(x_ND), layer["router"].shape[-1]), x_ND.dtype)
    share_NE = share_NE.at[jnp.arange(len(x_ND))[:, None], expert_NX].set(gate_NX)
    hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x_ND, layer["gate"])) * jnp.einsum("nd,edf->enf", x_ND, layer["up"])
    return jnp.einsum("enf,efd,ne->nd", hidden, layer["down"], share_NE)


def routed(x_ND: Array, layer: Tree) -> tuple[Array, Array]:
    """Each token's weights of the experts that it chose, which add up to 1, and their numbers."""
    scores_NE = jax.nn.softmax((x_ND @ layer["router"]).astype(jnp.float32))
    gate_NX, expert_NX = jax.lax.top_k(scores_NE, TOP)
    return (gate_NX / gate_NX.sum(-1, keepdims=True)).astype(x_ND.dtype), expert_NX


def make_loss(s: Sizes, *, dense: bool) -> Callable[[Tree, Array, Array], Array]:
    """The function (weights, tokens_BT, targets_BT) -> mean loss of what is predicted; dense: as all_of_them."""
    dtype = jnp.dtype(s.dtype)

    def mlp(x_BTD: Array, layer: Tree) -> Array:
        if not s.experts:
            return (jax.nn.silu(x_BTD @ layer["gate"]) * (x_BTD @ layer["up"])) @ layer["down"]
        experts = all_of_them if dense else chosen_alone
        return experts(x_BTD.reshape(-1, s.d), layer).reshape(x_BTD.shape)

    def loss_of(weights: Tree, tokens: Array, targets: Array) -> Array:
        weights = jax.tree.map(lambda x: x.astype(dtype), weights)
        x = weights["embedding"][tokens]
        for layer in weights["layers"]:
            q, k, v = jnp.einsum("btd,dnhc->nbthc", rms_norm(x, layer["before_attention"]), layer["qkv"])
            mixed = jax.nn.dot_product_attention(rotary(q), rotary(k), v, is_causal=s.masked is None)
            x = x + jnp.einsum("bthc,hcd->btd", mixed, layer["out"])
            x = x + mlp(rms_norm(x, layer["before_mlp"]), layer)
        logits = (rms_norm(x, weights["norm"]) @ weights["head"]).astype(jnp.float32)
        counted = targets != NOT_PREDICTED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets, 0))
        return jnp.sum(losses * counted) / jnp.sum(counted)

    return loss_of
