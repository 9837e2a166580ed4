"""The figures of an evaluation, from sums that simply add over tokens."""

import math
from typing import NamedTuple

Figures = dict[str, float | int | None]


class Sums(NamedTuple):
    """Over scored tokens: nats, right first guesses, how many there are, and the bytes of text that they stand for."""

    nll: float = 0.0
    correct: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def plus(self, other: "Sums") -> "Sums":
        """Field by field."""
        return Sums(
            self.nll + other.nll, self.correct + other.correct, self.tokens + other.tokens, self.bytes + other.bytes
        )


def figures(sums: Sums, *, masked: bool = False) -> Figures:
    """loss (nats a token), perplexity, bits_per_byte, accuracy, tokens, bytes; None for what is not a finite number.

    Of masked tokens there are no bits per byte: what is seen on both sides of them has paid for most of the text.
    """
    loss = _share(sums.nll, sums.tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
        "bits_per_byte": None if masked else _share(sums.nll / math.log(2), sums.bytes),
        "accuracy": _share(sums.correct, sums.tokens),
        "tokens": sums.tokens,
        "bytes": sums.bytes,
    }


def _share(total: float, weight: int) -> float | None:
    return total / weight if weight and math.isfinite(total) else None
