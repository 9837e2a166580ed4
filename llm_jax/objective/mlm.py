"""Masked-language modelling: some tokens of a row are hidden, and predicted from both sides of their document."""

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llm_jax.batch import Batch, place, segments_and_positions
from llm_jax.data.config import MASK_ID, PAD_ID, SPECIAL_PIECES
from llm_jax.mesh import acts
from llm_jax.objective.config import MlmConfig


def make_batch(
    rows_ABU: Array, keys_AB: Array, objective: MlmConfig, word_starts_V: np.ndarray, cross_documents: bool
) -> Batch:
    """The first T tokens of rows of U = T + 1 tokens, some of them hidden, and what those were.

    keys_AB: a key a row, from which all that is drawn for it follows; word_starts_V: Tokenizer.word_starts.
    """
    parts = jax.sharding.get_abstract_mesh().shape["context"]
    N = n_places(objective.rate, rows_ABU.shape[-1] - 1, parts)

    def local(tokens_ABT: Array, keys_AB: Array) -> Hidden:
        return jax.vmap(jax.vmap(lambda tokens_T, key: hide(tokens_T, key, objective, word_starts_V, N)))(
            tokens_ABT, keys_AB
        )

    # Rows are whole on every device that holds them, and so is all that is drawn for them.
    wall = jax.shard_map(local, in_specs=(acts("AB"), acts("AB")), out_specs=acts("AB"))
    hidden = wall(rows_ABU[..., :-1], keys_AB)
    segments_ABT, positions_ABT = segments_and_positions(rows_ABU, cross_documents)
    return Batch(
        tokens_BT=place(hidden.tokens_T),
        segments_BT=segments_ABT,
        positions_BT=positions_ABT,
        targets_BN=place(hidden.targets_N),
        weights_BN=place(hidden.weights_N),
        places_BN=place(hidden.places_N),
    )


class Hidden(NamedTuple):
    """A row of which some tokens are hidden; the predicted places in order, the rest of N being without weight."""

    tokens_T: Array
    targets_N: Array
    weights_N: Array
    places_N: Array


def n_places(rate: float, T: int, parts: int) -> int:
    """N: room for the predicted tokens of a row, a multiple of the parts that N is divided into."""
    return -(-math.ceil(_decimal(rate) * T) // parts) * parts


def budgets(rate: float, T: int) -> np.ndarray:
    """int32 [T + 1]: how many of 0, 1, ... T tokens are predicted: rate times as many, halves rounded up.

    The rate is taken as it is written: 0.15 is 15 of 100, and not the nearest binary fraction below it.
    """
    return np.array([math.floor(_decimal(rate) * n + Fraction(1, 2)) for n in range(T + 1)], np.int32)


def _decimal(rate: float) -> Fraction:
    return Fraction(repr(rate))


def hide(tokens_T: Array, key: Array, objective: MlmConfig, word_starts_V: np.ndarray, N: int) -> Hidden:
    """One row; N only makes room, what is drawn does not depend on it."""
    T = tokens_T.shape[0]
    unit_key, order_key, fate_key, piece_key = jax.random.split(key, 4)
    places_N, n = choose(unit_numbers(tokens_T, unit_key, objective, word_starts_V), order_key, objective.rate, N)
    asked_N = jnp.arange(N) < n
    targets_N = jnp.where(asked_N, tokens_T[places_N], PAD_ID)

    fate_N = jax.random.uniform(fate_key, (T,))[places_N]
    piece_N = jax.random.randint(piece_key, (T,), len(SPECIAL_PIECES), len(word_starts_V), tokens_T.dtype)[places_N]
    seen_N = jnp.where(fate_N < objective.mask_share + objective.random_share, piece_N, targets_N)
    seen_N = jnp.where(fate_N < objective.mask_share, MASK_ID, seen_N)
    hidden_T = tokens_T.at[jnp.where(asked_N, places_N, T)].set(seen_N, mode="drop")
    return Hidden(hidden_T, targets_N, asked_N.astype(jnp.float32), places_N)


def unit_numbers(tokens_T: Array, key: Array, objective: MlmConfig, word_starts_V: np.ndarray) -> Array:
    """Of each token the number, from 1, of the token, word or span that is hidden as a whole; 0 for control tokens."""
    free_T = tokens_T >= len(SPECIAL_PIECES)
    no = jnp.zeros((1,), bool)
    match objective.unit:
        case "token":
            begins_T = free_T
        case "word":
            before_T2, after_T2 = (jnp.asarray(word_starts_V)[tokens] for tokens in (tokens_T, tokens_T[:-1]))
            begins_T = before_T2[:, 0] | jnp.concatenate([no, after_T2[:, 1]])
        case "span":
            # Where each token begins a span with probability 1 / mean, lengths are geometric with that mean.
            begins_T = jax.random.bernoulli(key, 1 / objective.span_mean, tokens_T.shape)
    goes_on_T = jnp.concatenate([no, free_T[:-1]])
    number_T = jnp.cumsum((free_T & (begins_T | ~goes_on_T)).astype(jnp.int32))
    return jnp.where(free_T, number_T, 0)


def choose(unit_T: Array, key: Array, rate: float, N: int) -> tuple[Array, Array]:
    """The places of units drawn one after the other, for as long as they stay within the budget; and how many places.

    places_N are in order, the last place of the row where there are no more.
    """
    T = unit_T.shape[0]
    budget = jnp.asarray(budgets(rate, T))[jnp.sum((unit_T > 0).astype(jnp.int32))]
    # A lot a unit: 31 bits, under one that puts control tokens last. Equal lots are told apart by the unit's number.
    lot_T = jax.random.bits(key, (T + 1,), jnp.uint32)[unit_T] >> 1
    lot_T = jnp.where(unit_T > 0, lot_T, jnp.uint32(2**31))
    _, drawn_T, place_T = jax.lax.sort((lot_T, unit_T, jnp.arange(T)), num_keys=2)
    whole_T = drawn_T != jnp.concatenate([drawn_T[1:], jnp.zeros((1,), drawn_T.dtype)])
    count_T = jnp.arange(1, T + 1)
    n = jnp.max(jnp.where(whole_T & (count_T <= budget), count_T, 0))
    places_N = jnp.sort(jnp.where(jnp.arange(N) < n, place_T[:N], T))
    return jnp.minimum(places_N, T - 1), n
