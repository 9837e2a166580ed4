"""Kernels, behind the wall of a shard_map: inside of a kernel there are no shardings, so none may be lost there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from llm_jax.mesh import acts
from llm_jax.model.sight import ATTENDED, Places, Sight

# Only a TPU runs its kernels; anything else can read them aloud, which is for tests.
INTERPRET = False

# A TPU's registers are so wide: rows are filled up to a multiple of it.
LANES = 128
# Queries and keys of a tile, where the row's length allows.
TILE = 512

# The document of what a row was filled up with.
NOBODY = -1


def splash(
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    here: Places,
    there: Places,
    sight: Sight,
    soft_cap: float | None,
) -> Array:
    """JAX's attention kernel for TPUs, which skips tiles that nobody sees (SplashAttention, 2023); see `attention`.

    Memory O(T). It knows no global tokens. Where context divides T into parts that are not multiples of 128, each
    device computes all of them: rows of training are longer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (T, H), (S, K) = q_BTHC.shape[1:3], k_BSKC.shape[1:3]
    parts = mesh.shape["context"]
    divided = T % (parts * LANES) == S % LANES == 0
    parts, t = (parts, "T") if divided else (1, "S")
    kernel = _kernel(_rounded(T), _rounded(S), H // K, sight, soft_cap, parts)
    # Which tiles a part of the queries sees is its own, unless all see all.
    of_part = acts("T") if divided and (sight.causal or sight.window is not None) else jax.P(None)
    tiles = kernel.manual_sharding_spec(jax.NamedSharding(mesh, jax.P(None, *of_part)))
    kernel = jax.tree.map(jax.reshard, kernel, tiles)
    q_BTHC, here_BT = jax.reshard((q_BTHC, _documents(here, sight, S)), (acts(f"B{t}HC"), acts(f"B{t}")))
    specs = (tiles, *(acts(letters) for letters in (f"B{t}HC", "BSKC", "BSKC", "H", f"B{t}", "BS")))
    o_BTHC = jax.shard_map(_rows, in_specs=specs, out_specs=acts(f"B{t}HC"), check_vma=False)(
        kernel, q_BTHC, k_BSKC, v_BSKC, sinks_H, here_BT, _documents(there, sight, S)
    )
    return jax.reshard(o_BTHC, acts("BTHC"))


def _rows(
    kernel: splash_kernel.SplashAttentionKernel,
    q_BTHC: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    sinks_H: Array | None,
    here_BT: Array,
    there_BS: Array,
) -> Array:
    """A device's rows, queries and heads, all of which the kernel takes one by one."""
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTHC, k_BSKC, v_BSKC = (_filled(x, 0) for x in (q_BTHC * (1 / math.sqrt(C)), k_BSKC, v_BSKC))
    q_BKGTC = jnp.moveaxis(q_BTHC.reshape(B, -1, K, H // K, C), 1, 3)
    k_BKSC, v_BKSC = jnp.moveaxis(k_BSKC, 2, 1), jnp.moveaxis(v_BSKC, 2, 1)
    sinks_KG = None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(K, H // K)

    def row(q_KGTC: Array, k_KSC: Array, v_KSC: Array, here_T: Array, there_S: Array) -> Array:
        documents = splash_kernel.SegmentIds(here_T, there_S)

        def group(q_GTC: Array, k_SC: Array, v_SC: Array, sinks_G: Array | None) -> Array:
            o_GTC = kernel(q_GTC, k_SC, v_SC, documents, sinks_G)
            assert isinstance(o_GTC, Array)
            return o_GTC

        return jax.vmap(group)(q_KGTC, k_KSC, v_KSC, sinks_KG)

    documents = _filled(here_BT, NOBODY), _filled(there_BS, NOBODY)
    o_BKGTC = jax.vmap(row)(q_BKGTC, k_BKSC, v_BKSC, *documents)
    return jnp.moveaxis(o_BKGTC, 3, 1).reshape(B, -1, H, C)[:, :T]


def _documents(places: Places, sight: Sight, S: int) -> Array:
    """One number a document; with blocks, one a block of a document, which is all that a query of it sees."""
    if sight.block is None:
        return places.segments
    return places.segments * (S // sight.block + 1) + places.positions // sight.block


def _kernel(
    T: int, S: int, G: int, sight: Sight, soft_cap: float | None, parts: int
) -> splash_kernel.SplashAttentionKernel:
    """For a group of query heads that share a key head; T is divided into parts, over the mesh's context axis."""
    if sight.window is not None:
        behind = sight.window - 1 if sight.causal else sight.window // 2
        mask = splash_mask.LocalMask((T, S), (behind, 0 if sight.causal else behind), 0, parts)
    elif sight.causal:
        mask = splash_mask.CausalMask((T, S), shard_count=parts)
    else:
        mask, T, parts = splash_mask.FullMask((T // parts, S)), T // parts, 1
    of_queries, of_keys = _tile(T // parts), _tile(S)
    return splash_kernel.make_splash_mqa(
        splash_mask.MultiHeadMask([mask] * G),
        block_sizes=splash_kernel.BlockSizes(
            block_q=of_queries,
            block_kv=of_keys,
            block_kv_compute=of_keys,
            block_q_dkv=of_queries,
            block_kv_dkv=of_keys,
            block_kv_dkv_compute=of_keys,
            block_q_dq=of_queries,
            block_kv_dq=of_keys,
        ),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=ATTENDED,
        head_shards=1,
        q_seq_shards=parts,
        interpret=INTERPRET,
    )


def _tile(length: int) -> int:
    """The largest multiple of 128 up to TILE that divides the length."""
    return next(tile for tile in range(TILE, 0, -LANES) if length % tile == 0)


def _rounded(length: int) -> int:
    """Up to a multiple of LANES."""
    return length + -length % LANES


def _filled(x_BT: Array, value: int) -> Array:
    """The second axis, up to a multiple of LANES."""
    length = x_BT.shape[1]
    return jnp.pad(x_BT, [(0, 0), (0, _rounded(length) - length)] + [(0, 0)] * (x_BT.ndim - 2), constant_values=value)


def varying_alike(*arrays: Array) -> list[Array]:
    """Inside a shard_map: over which axes any of them varies, so do all."""
    axes = frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    return [
        jax.lax.pcast(a, tuple(missing), to="varying")
        if (missing := axes - jax.typeof(a).manual_axis_type.varying)
        else a
        for a in arrays
    ]


def like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Of another shape and type, varying as x."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def product_cost(R: int, weight: tuple[int, ...], itemsize: int) -> pl.CostEstimate:
    """That of a product in which each row meets one matrix of the weight [E, D, F]."""
    E, D, F = weight
    moved = R * (D + F) + E * D * F
    return pl.CostEstimate(flops=2 * R * D * F, transcendentals=0, bytes_accessed=itemsize * moved)
