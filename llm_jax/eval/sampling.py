"""Which token comes next, given the logits: the likeliest, or one drawn from what the filters leave."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is made; filters apply in the order of these fields, to what the ones before have left."""

    max_tokens: int = 128
    """At most so many new tokens."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are there already are divided by it, or multiplied where negative (CTRL, Keskar 2019)."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int | None = None
    """The so many likeliest (Fan et al. 2018)."""
    top_p: float | None = None
    """The likeliest that together have at least this probability (nucleus sampling, Holtzman et al. 2019)."""
    min_p: float | None = None
    """Those at least this many times as likely as the likeliest (Nguyen et al. 2024)."""
    seed: int = 0
    """Everything random follows from it, the row and the position."""

    @property
    def remembers(self) -> bool:
        """Whether it matters which tokens are there already."""
        return self.repetition_penalty != 1.0


def draw(logits_BV: Array, seen_BV: Array | None, keys_B: Array, sampling: Sampling) -> Array:
    """The next token of each row, int32 [B].

    logits_BV: float32, V whole on every device, -inf for padded pieces; seen_BV: bool, which tokens are there; keys_B:
    a key for each row, so that a row's draw does not depend on the others.
    """
    if seen_BV is not None and sampling.remembers:
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    left_BV = filtered(logits_BV / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, left_BV).astype(jnp.int32)


def filtered(logits_BV: Array, sampling: Sampling) -> Array:
    """The logits, -inf where a filter leaves a token out; equal logits are kept or left out together."""
    if sampling.top_k is not None:
        kth_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if sampling.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        share_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # What the likelier ones have together; the first always stays.
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        lowest_B1 = jnp.min(jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
    if sampling.min_p is not None:
        highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= highest_B1 + jnp.log(sampling.min_p), logits_BV, -jnp.inf)
    return logits_BV


def row_keys(seed: Array, row_B: Array, position_B: Array) -> Array:
    """A key for each row's next token: a function of the seed, the row's number and the position, int32 [B]."""

    def one(row: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)

    return jax.vmap(one)(row_B, position_B)
