"""What a masked language model makes of a held-out row: its first guess at every place that it was asked for."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, P

from llm_jax.data.loader import Rows
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.restore import row_parts
from llm_jax.eval.rows import Ask, rows_on_mesh
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights, abstract_model, logits
from llm_jax.objective.loss import at_places

# Tokens of a row that are shown.
SHOWN = 256

# Stretches of text as they were, with None; and guesses, with the token that was there.
Filled = Sequence[tuple[str, str | None]]


def make_fill(cfg: ModelConfig, ask: Ask, rows: Rows, tokenizer: Tokenizer) -> Callable[[Weights], Filled]:
    """The function from weights to the beginning of the first row with the model's guesses in it, compiled once.

    The mesh is set, cfg's attention resolved.
    """
    graph = abstract_model(cfg).graph

    @jax.jit
    def guess(weights: Weights, rows_ABU: Array, first: Array) -> tuple[Array, Array, Array]:
        model = nnx.merge(graph, *weights)
        asked = ask(rows_ABU, first)
        assert asked.places_BN is not None
        x_BTD, _ = model(asked.tokens_BT, asked.segments_BT, asked.positions_BT, cfg, causal=False)
        # The vocabulary comes together over tensor here.
        logits_BNV = jax.reshard(logits(model, at_places(x_BTD, asked.places_BN), cfg), acts("BND"))
        told = asked.places_BN, asked.weights_BN, jnp.argmax(logits_BNV, axis=-1)
        return jax.reshard(told, P())

    def fill(weights: Weights) -> Filled:
        rows_ABU, first = rows_on_mesh(rows, 0, row_parts(jax.sharding.get_mesh()))
        places_BN, weights_BN, guesses_BN = jax.device_get(guess(weights, rows_ABU, first))
        real_N = weights_BN[0] > 0
        guesses = dict(zip(places_BN[0][real_N].tolist(), guesses_BN[0][real_N].tolist(), strict=True))
        return filled(rows[np.zeros(1, int)][0, :-1][:SHOWN].tolist(), guesses, tokenizer)

    return fill


def filled(tokens: Sequence[int], guesses: dict[int, int], tokenizer: Tokenizer) -> Filled:
    """A row's tokens as text, with guesses by their places."""
    parts: list[tuple[str, str | None]] = []
    plain: list[int] = []
    for place, token in enumerate(tokens):
        if place not in guesses:
            plain.append(token)
            continue
        parts += [(tokenizer.decode(plain), None), (tokenizer.decode([guesses[place]]), tokenizer.decode([token]))]
        plain = []
    return [part for part in (*parts, (tokenizer.decode(plain), None)) if part != ("", None)]


def in_brackets(parts: Filled) -> str:
    """The text for a terminal: right guesses as [guess], others as [guess|what was there]."""

    def told(guess: str, original: str | None) -> str:
        if original is None:
            return guess
        guess, original = (repr(text)[1:-1] if "\n" in text else text for text in (guess, original))
        return f"[{guess}]" if guess == original else f"[{guess}|{original}]"

    return "".join(told(*part) for part in parts)
