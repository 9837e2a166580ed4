"""Attention backends behind one signature; all give the same numbers, they differ in memory and speed."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig

MASKED = -1e30


def resolve(cfg: ModelConfig, platform: str) -> ModelConfig:
    """The config with what depends on the platform (cpu, gpu, tpu) settled; done once, at start, and printed."""
    on_cpu = platform == "cpu"
    settled = {"attention": cfg.attention, "logit_chunk": cfg.logit_chunk or (2**21 if on_cpu else 2**28)}
    if cfg.attention == "auto":
        settled["attention"] = "chunked" if on_cpu else "xla"
    return cfg.model_copy(update=settled)


def attention(
    q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, segments_BT: Array, segments_BS: Array, *, causal: bool, backend: str
) -> Array:
    """Scaled dot-product attention inside segments; H query heads share K key heads in groups of H / K.

    T may be sharded over context, S is whole. Returns o_BTHC in q's type; scores and softmax are float32.
    """
    match backend:
        case "xla":
            return _xla(q_BTHC, k_BSKC, v_BSKC, segments_BT, segments_BS, causal)
        case "chunked":
            return _chunked(q_BTHC, k_BSKC, v_BSKC, segments_BT, segments_BS, causal)
    raise AssertionError(f"attention backend {backend!r} was not resolved")


def _xla(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, segments_BT: Array, segments_BS: Array, causal: bool) -> Array:
    """The reference: every score at once."""
    T, S = q_BTHC.shape[1], k_BSKC.shape[1]
    visible_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
    if causal:
        t_TS = jax.lax.broadcasted_iota(jnp.int32, (T, S), 0, out_sharding=acts("TS"))
        s_TS = jax.lax.broadcasted_iota(jnp.int32, (T, S), 1, out_sharding=acts("TS"))
        visible_BTS &= (s_TS <= t_TS)[None]
    return _dense(q_BTHC, k_BSKC, v_BSKC, visible_BTS)


def _dense(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, visible_BTS: Array) -> Array:
    shares_BKGTS = jax.nn.softmax(_scores(q_BTHC, k_BSKC, visible_BTS), axis=-1).astype(v_BSKC.dtype)
    return jnp.einsum("BKGTS,BSKC->BTKGC", shares_BKGTS, v_BSKC).reshape(q_BTHC.shape)


def _chunked(
    q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, segments_BT: Array, segments_BS: Array, causal: bool
) -> Array:
    """Blocks of queries in up to four spans, each against the keys it can see; memory O(block * S), not O(T * S)."""
    arguments = (q_BTHC, k_BSKC, v_BSKC, segments_BT, segments_BS)
    specs = tuple(acts(letters) for letters in ("BTHC", "BSKC", "BSKC", "BT", "BS"))

    def spans(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, segments_BT: Array, segments_BS: Array) -> Array:
        T, S = q_BTHC.shape[1], k_BSKC.shape[1]
        block = _block_length(T)
        length = -(-T // (4 * block)) * block
        first = jax.lax.axis_index("context") * T
        outputs = []
        for start in range(0, T, length):
            stop = min(start + length, T)
            # Under context parallelism a rank's first query is not known at compile time: it looks at all keys.
            end = stop if causal and T == S else S
            queries = (q_BTHC[:, start:stop], segments_BT[:, start:stop], first + start)
            outputs.append(_span(*queries, k_BSKC[:, :end], v_BSKC[:, :end], segments_BS[:, :end], block, causal))
        return jnp.concatenate(outputs, axis=1)

    # shard_map adds up the gradients of keys and values over context: every rank's queries looked at all of them.
    return jax.shard_map(spans, in_specs=specs, out_specs=acts("BTHC"), check_vma=False)(*arguments)


def _span(
    q_BTHC: Array,
    segments_BT: Array,
    first: Array,
    k_BSKC: Array,
    v_BSKC: Array,
    segments_BS: Array,
    block: int,
    causal: bool,
) -> Array:
    """Consecutive queries, the first of them at position `first` of its row: a loop over blocks that keeps no scores.

    Written out instead of looped, XLA would keep the scores of all blocks at once.
    """

    def one_block(queries: tuple[Array, Array, Array]) -> Array:
        q_BTHC, segments_BT, first = queries
        visible_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
        if causal:
            t_T = first + jnp.arange(block)
            visible_BTS &= (jnp.arange(segments_BS.shape[1])[None, :] <= t_T[:, None])[None]
        return _block(q_BTHC, k_BSKC, v_BSKC, visible_BTS)

    n = q_BTHC.shape[1] // block
    if n == 1:
        return one_block((q_BTHC, segments_BT, first))
    q_blocks, segments_blocks = (jnp.stack(jnp.split(x, n, axis=1)) for x in (q_BTHC, segments_BT))
    o_blocks = jax.lax.map(jax.checkpoint(one_block), (q_blocks, segments_blocks, first + block * jnp.arange(n)))
    return jnp.concatenate(list(o_blocks), axis=1)


@jax.custom_vjp
def _block(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, visible_BTS: Array) -> Array:
    """_dense's numbers; the backward pass makes the scores again from the log-normalisers, as in FlashAttention
    (Dao et al. 2022), instead of reading back what the softmax left."""
    return _block_forward(q_BTHC, k_BSKC, v_BSKC, visible_BTS)[0]


def _block_forward(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, visible_BTS: Array) -> tuple[Array, tuple[Array, ...]]:
    B, T, H, C = q_BTHC.shape
    scores_BKGTS = _scores(q_BTHC, k_BSKC, visible_BTS)
    highest_BKGT = jnp.max(scores_BKGTS, axis=-1)
    exp_BKGTS = jnp.exp(scores_BKGTS - highest_BKGT[..., None])
    sum_BKGT = jnp.sum(exp_BKGTS, axis=-1)
    o_BKGTC = jnp.einsum("BKGTS,BSKC->BKGTC", exp_BKGTS.astype(v_BSKC.dtype), v_BSKC)
    o_BKGTC = (o_BKGTC / sum_BKGT[..., None]).astype(v_BSKC.dtype)
    o_BTHC = jnp.moveaxis(o_BKGTC, 3, 1).reshape(B, T, H, C)
    return o_BTHC, (q_BTHC, k_BSKC, v_BSKC, visible_BTS, o_BKGTC, highest_BKGT + jnp.log(sum_BKGT))


def _block_backward(saved: tuple[Array, ...], do_BTHC: Array) -> tuple[Array, Array, Array, None]:
    q_BTHC, k_BSKC, v_BSKC, visible_BTS, o_BKGTC, normaliser_BKGT = saved
    B, T, H, C = q_BTHC.shape
    do_BKGTC = jnp.moveaxis(_grouped(do_BTHC, k_BSKC), 1, 3)
    share_BKGTS = jnp.exp(_scores(q_BTHC, k_BSKC, visible_BTS) - normaliser_BKGT[..., None])
    dshare_BKGTS = jnp.einsum("BKGTC,BSKC->BKGTS", do_BKGTC, v_BSKC, preferred_element_type=jnp.float32)
    inner_BKGT = jnp.sum(do_BKGTC.astype(jnp.float32) * o_BKGTC, axis=-1)
    dscores_BKGTS = (share_BKGTS * (dshare_BKGTS - inner_BKGT[..., None])).astype(q_BTHC.dtype)
    scale = 1 / math.sqrt(C)
    dq_BTHC = (jnp.einsum("BKGTS,BSKC->BTKGC", dscores_BKGTS, k_BSKC) * scale).reshape(B, T, H, C)
    dk_BSKC = jnp.einsum("BKGTS,BTKGC->BSKC", dscores_BKGTS, _grouped(q_BTHC * scale, k_BSKC))
    dv_BSKC = jnp.einsum("BKGTS,BKGTC->BSKC", share_BKGTS.astype(v_BSKC.dtype), do_BKGTC)
    return dq_BTHC, dk_BSKC, dv_BSKC, None


_block.defvjp(_block_forward, _block_backward)


def _scores(q_BTHC: Array, k_BSKC: Array, visible_BTS: Array) -> Array:
    """Float32 scores_BKGTS, MASKED where a query may not look."""
    q_BTKGC = _grouped(q_BTHC * (1 / math.sqrt(q_BTHC.shape[-1])), k_BSKC)
    scores_BKGTS = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32)
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)


def _grouped(x_BTHC: Array, k_BSKC: Array) -> Array:
    """[B, T, K, G, C]: the query heads of each key head together."""
    B, T, H, C = x_BTHC.shape
    return x_BTHC.reshape(B, T, k_BSKC.shape[2], H // k_BSKC.shape[2], C)


def _block_length(T: int) -> int:
    """A quarter of the row, between 64 and 512, that divides it; the row itself where nothing does."""
    for block in range(min(max(64, T // 4), 512, T), 31, -1):
        if T % block == 0:
            return block
    return T
