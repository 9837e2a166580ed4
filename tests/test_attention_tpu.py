"""Splash attention compiles for TPU chips ahead of time, on every mesh, and keeps no scores."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from llm_jax.mesh import acts
from llm_jax.model.attention import attention
from llm_jax.model.sight import Places, Sight
from tests.chips import mesh_on

pytestmark = pytest.mark.slow

B, T, H, K, C = 4, 8192, 8, 4, 64


def temporary_bytes(backend: str, sight: Sight, **how: Any) -> int:
    """What a device needs beside arguments and results for attention and its gradients, in bfloat16 on 8 chips."""
    mesh = mesh_on("v5e:2x4", fsdp=2, tensor=2, context=2)

    def loss(q: Array, k: Array, v: Array, sinks_H: Array, segments: Array, positions: Array) -> Array:
        here = Places(segments, positions)
        there = Places(*jax.reshard(tuple(here), (acts("BS"), acts("BS"))))
        k_BSKC, v_BSKC = (jax.reshard(x, acts("BSKC")) for x in (k, v))
        rest = {"soft_cap": None, "sinks_H": None} | how
        if rest["sinks_H"]:
            rest["sinks_H"] = sinks_H
        o = attention(q, k_BSKC, v_BSKC, here, there, sight=sight, backend=backend, **rest)
        return jnp.sum(o.astype(jnp.float32))

    kinds = {"B": B, "T": T, "H": H, "K": K, "C": C}

    def example(letters: str, dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, acts(letters) if len(letters) > 1 else jax.P())
        return jax.ShapeDtypeStruct(tuple(kinds[a] for a in letters), dtype, sharding=sharding)

    floats = [example(letters, jnp.bfloat16) for letters in ("BTHC", "BTKC", "BTKC")]
    places = [example("BT", jnp.int32)] * 2
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = gradient.lower(*floats, example("H", jnp.float32), *places).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert ("tpu_custom_call" in (compiled.as_text() or "")) == (backend == "splash")
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("sight", "how"),
    [
        (Sight(True), {"soft_cap": 20.0, "sinks_H": True}),
        (Sight(True, window=128), {}),
        (Sight(False, window=128), {}),
        (Sight(False, block=100), {}),
    ],
)
def test_splash_compiles_for_chips(sight: Sight, how: dict[str, Any]) -> None:
    assert temporary_bytes("splash", sight, **how) < B * H * T * T / 8


def test_the_reference_keeps_scores() -> None:
    """The bound above is one that can be broken."""
    assert temporary_bytes("xla", Sight(True)) > B * H * T * T / 8
