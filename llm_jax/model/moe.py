"""Mixtures of experts: a router chooses, tokens go to their experts' devices, experts multiply, results come back."""

from typing import NamedTuple

from jax import Array


class Routing(NamedTuple):
    """What the routers of layers that share a place did, L layers stacked in front; tokens are those of documents."""

    load_LE: Array
    """Tokens that chose each expert, int32."""
    load_balance: Array
    """The load-balance loss, a float32 sum over rows and layers; the only field with a gradient beside router_z."""
    router_z: Array
    """Squared log-normalisers of router logits, a float32 sum over tokens and layers."""
    entropy: Array
    """Entropies of the routers' scores in nats, a float32 sum over tokens and layers."""
    dropped: Array
    """Choices that found their expert full, an int32 sum over layers."""
    experts_LBTX: Array
    """The chosen experts, int32, best first; for tests, and removed by XLA where nobody looks."""
