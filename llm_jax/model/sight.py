"""Who sees whom: the mask of every kind of attention, and how far along the row it lets a query look."""

from typing import NamedTuple

from jax import Array

# What a score becomes where a query may not look.
MASKED = -1e30
# The name under which backends tell remat of their output, and of what their backward pass wants beside it.
ATTENDED = "attended"


class Places(NamedTuple):
    """Where tokens stand, int32 [B, T], or [B, S] for keys; a document's tokens follow each other in their row."""

    segments: Array
    """One number a document."""
    positions: Array
    """Counted inside the document, so that what shares a row changes nothing."""


class Sight(NamedTuple):
    """Which keys a query sees: those of its own document that all of these allow; itself always."""

    causal: bool
    """Only itself and what came before."""
    window: int | None = None
    """The last so many positions, itself included; without `causal` half of it to either side (ModernBERT, Warner et
    al. 2024: 128 is 64 to the left, itself, 64 to the right)."""
    block: int | None = None
    """Its own block of so many positions: 0 to block - 1 of the document, block to 2 * block - 1, ..."""
    global_tokens: int = 0
    """In spite of `block`, a document's first so many tokens see all of it, and all of it sees them (Longformer,
    Beltagy et al. 2020; BigBird, Zaheer et al. 2020)."""


def visible(here: Places, there: Places, t_T: Array, s_S: Array, sight: Sight) -> Array:
    """Bool visible_BTS: whether a query sees a key; t_T and s_S are their places in the row.

    All four arrays may be sharded along T; inside a document a distance in the row is a distance in the document.
    """
    visible_BTS = here.segments[:, :, None] == there.segments[:, None, :]
    if sight.causal:
        visible_BTS &= (s_S[None, :] <= t_T[:, None])[None]
    if sight.window is not None:
        behind, ahead = _window_reach(sight.window, sight.causal)
        distance_TS = s_S[None, :] - t_T[:, None]
        visible_BTS &= ((distance_TS >= -behind) & (distance_TS <= ahead))[None]
    if sight.block is not None:
        t_BT, s_BS = here.positions, there.positions
        near_BTS = (t_BT // sight.block)[:, :, None] == (s_BS // sight.block)[:, None, :]
        if sight.global_tokens:
            near_BTS |= (t_BT < sight.global_tokens)[:, :, None] | (s_BS < sight.global_tokens)[:, None, :]
        visible_BTS &= near_BTS
    return visible_BTS


def reach(sight: Sight, S: int) -> tuple[int, int]:
    """How many places of a row of S a query may see behind itself, and how many ahead, at most."""
    behind, ahead = S, 0 if sight.causal else S
    if sight.window is not None:
        in_window = _window_reach(sight.window, sight.causal)
        behind, ahead = min(behind, in_window[0]), min(ahead, in_window[1])
    if sight.block is not None and not sight.global_tokens:
        behind, ahead = min(behind, sight.block - 1), min(ahead, sight.block - 1)
    return behind, ahead


def _window_reach(window: int, causal: bool) -> tuple[int, int]:
    return (window - 1, 0) if causal else (window // 2, window // 2)
