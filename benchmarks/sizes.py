"""What a peer of compare.py has to know: a model's sizes, and what its batches hold. Standard library only."""

from typing import NamedTuple

# Ids of the mask and of the first ordinary piece, and the target of a position that is not predicted.
MASK, SPECIAL, NOT_PREDICTED = 4, 5, -100
# Batches that a peer goes through again and again.
BATCHES = 8
# Experts that a token takes.
TOP = 2


class Sizes(NamedTuple):
    """As compare.py makes them of a run, and passes them as JSON."""

    layers: int
    d: int
    heads: int
    ff: int
    vocab: int
    seq: int
    rows: int
    masked: float | None
    """The share of tokens that is hidden and predicted; None: every token is predicted from those before it."""
    experts: int
    dtype: str
    """What is computed in; weights and optimizer stay in float32."""
