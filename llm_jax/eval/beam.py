"""Beam search: of the texts that the likeliest beginnings lead to, those with the best length-normalised likelihood.

As T5X does it: W beginnings live on in any case, the W best texts that have ended are kept beside them, and the search
is over when no live one can become better than the worst of those. Letters of its own: W beam, R = B * W row of the
cache (a prompt's beams next to each other), J = 2 * W candidate; N counts new tokens.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, P

from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID, EOS_ID
from llm_jax.eval.generate import CHUNK, ENDS, Prompt, aligned, by_row, lengths, room
from llm_jax.eval.scorer import on_mesh
from llm_jax.mesh import acts
from llm_jax.model import decode
from llm_jax.model.config import ModelConfig
from llm_jax.model.decode import Cache
from llm_jax.model.transformer import Weights, abstract_model


class Searching(NamedTuple):
    """How texts are sought."""

    beams: int = 4
    """W."""
    length_penalty: float = 0.6
    """alpha >= 0: a text's score is its log-likelihood divided by ((5 + its tokens) / 6) ** alpha (Wu et al. 2016)."""
    max_tokens: int = 128
    """N: at most so many new tokens."""


class Beams(NamedTuple):
    """W live beginnings of each prompt's text, and the W best texts that have ended; the best first."""

    nats_BW: Array
    """Log-likelihood; -inf where there is none yet."""
    ids_BWN: Array
    """EOS where there is none yet."""
    ended_score_BW: Array
    ended_nats_BW: Array
    ended_ids_BWN: Array


class Under(NamedTuple):
    """A search under way; all arrays but n and t are divided over the mesh by prompts."""

    n: Array
    """How many new tokens there are, int32 scalar."""
    t: Array
    """The place in the rows of the next one."""
    logits_RV: Array
    cache: Cache
    beams: Beams


class Text(NamedTuple):
    """What was found, and how likely it is."""

    ids: list[int]
    log_likelihood: float
    """Nats, those of the token that ends it included."""
    score: float
    """Normalised by length."""
    ended: bool
    """By itself, and not because it had max_tokens."""


class Finder(NamedTuple):
    """The compiled parts of a search; `make_finder` makes them."""

    begin: Callable[..., Under]
    go_on: Callable[[Weights, Under], tuple[Under, Beams, Array]]
    searching: Searching
    seq_len: int
    read: int
    """So many ids of a prompt, at most."""


def make_finder(cfg: ModelConfig, seq_len: int, searching: Searching) -> Finder:
    """For weights of `decode.unrolled(cfg)`'s structure; a token sees the last seq_len at most. The mesh is set.

    Raises ConfigError where the mesh has a context axis, or the vocabulary is smaller than the candidates are many.
    """
    decode.check_mesh(jax.sharding.get_mesh())
    if 2 * searching.beams > cfg.vocab_size:
        raise ConfigError(f"{searching.beams} beams: at most half of model.vocab_size = {cfg.vocab_size}")
    read = room(seq_len, cfg.learned_positions, searching.max_tokens)
    if cfg.learned_positions:
        searching = searching._replace(max_tokens=min(searching.max_tokens, cfg.learned_positions - read))
    graph = abstract_model(cfg).graph

    def begin(weights: Weights, tokens_BT: Array, start_B: Array, from_R: Array, beams: Beams, slots: int) -> Under:
        logits_BV, cache = decode.prefill(nnx.merge(graph, *weights), tokens_BT, start_B, slots, cfg)
        logits_RV, cache = decode.rows_of((logits_BV, cache), from_R)
        return Under(jnp.int32(0), jnp.int32(tokens_BT.shape[1]), logits_RV, cache, beams)

    def go_on(weights: Weights, under: Under) -> tuple[Under, Beams, Array]:
        """At most CHUNK tokens more; the beams, and which prompts' search is over, on every device."""
        model, first = nnx.merge(graph, *weights), under.n

        def unfinished(under: Under) -> Array:
            left = under.n < jnp.minimum(first + CHUNK, searching.max_tokens)
            return left & ~jnp.all(_over(under.beams, searching))

        def one(under: Under) -> Under:
            beams, token_R, cache = _chosen(under, searching)
            logits_RV, cache = decode.step(model, token_R, under.t, cache, cfg)
            return Under(under.n + 1, under.t + 1, logits_RV, cache, beams)

        under = jax.lax.while_loop(unfinished, one, under)
        return under, *jax.reshard((under.beams, _over(under.beams, searching)), P())

    programs = jax.jit(begin, static_argnums=5), jax.jit(go_on, donate_argnums=1)
    return Finder(*programs, searching, seq_len, read)


def search(finder: Finder, weights: Weights, prompts: Sequence[Prompt]) -> Iterator[list[list[Text]]]:
    """Each prompt's W texts, the best first: nothing as long as it is sought, then all at once.

    Where max_tokens end the search, live beginnings count as texts too. What shares a batch makes no difference.
    """
    W, _, N = finder.searching
    kept = [prompt.ids[-finder.read :] for prompt in prompts]
    T, slots = lengths(kept, N, finder.seq_len)
    tokens_BT, start_B = aligned(kept, T)
    from_R = np.repeat(np.arange(len(start_B), dtype=np.int32), W)
    beams = _nothing_yet(len(prompts), len(start_B), finder.searching)
    under = finder.begin(weights, on_mesh(tokens_BT), by_row(start_B), by_row(from_R), beams, slots)
    over_B = np.zeros(len(prompts), bool)
    for _ in range(0, N, CHUNK):
        under, beams, over_B = finder.go_on(weights, under)
        over_B = jax.device_get(over_B)
        if over_B.all():
            break
        yield [[] for _ in prompts]
    beams = jax.device_get(beams)
    yield [_texts(jax.tree.map(lambda x, b=b: x[b], beams), over_B[b], finder.searching) for b in range(len(prompts))]


def penalty(n: Array | int, searching: Searching) -> Array:
    """What divides the log-likelihood of a text of n tokens."""
    return ((5.0 + n) / 6.0) ** jnp.float32(searching.length_penalty)


def _nothing_yet(n: int, B: int, searching: Searching) -> Beams:
    """One beginning of each of n prompts, and none of rows that only fill up the mesh: their search is over."""
    W, _, N = searching
    nats_BW = np.full((B, W), -np.inf, np.float32)
    nothing_BW, ids_BWN = nats_BW.copy(), np.full((B, W, N), EOS_ID, np.int32)
    nats_BW[:n, 0] = 0.0
    return Beams(*map(by_row, (nats_BW, ids_BWN, nothing_BW, nothing_BW, ids_BWN)))


def _over(beams: Beams, searching: Searching) -> Array:
    """Whether the best live beginning, were nothing more against it, is no better than the worst ended text, [B]."""
    bound_B = beams.nats_BW[:, 0] / penalty(searching.max_tokens, searching)
    return bound_B <= beams.ended_score_BW[:, -1]


def _chosen(under: Under, searching: Searching) -> tuple[Beams, Array, Cache]:
    """The beams with one token more, that token of each live one, and the cache's rows in their order.

    A device has all beams of a prompt: nothing moves between devices.
    """

    def local(beams: Beams, logits_RV: Array, cache: Cache, n: Array) -> tuple[Beams, Array, Cache]:
        beams, token_R, from_R = _advanced(beams, logits_RV, n, searching)
        return beams, token_R, jax.tree.map(lambda x: x.at[from_R].get(mode="clip"), cache)

    given = (under.beams, under.logits_RV, under.cache, under.n)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, given)
    out = (specs[0], acts("B"), specs[2])
    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(*given)


def _advanced(beams: Beams, logits_RV: Array, n: Array, searching: Searching) -> tuple[Beams, Array, Array]:
    """The beams with their n-th token, counted from 0; the live ones' tokens, and which row each comes from."""
    B, W, N = beams.ids_BWN.shape
    J = 2 * W
    logit_RJ, token_RJ = jax.lax.top_k(logits_RV, J)
    more_RJ = logit_RJ - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
    # Each beam's J likeliest hold the J likeliest of all, at most W of which end a text.
    nats_BJ, at_BJ = jax.lax.top_k((beams.nats_BW[..., None] + more_RJ.reshape(B, W, J)).reshape(B, W * J), J)
    token_BJ = jnp.take_along_axis(token_RJ.reshape(B, W * J), at_BJ, axis=1)
    ids_BJN = jnp.take_along_axis(beams.ids_BWN, (at_BJ // J)[..., None], axis=1)
    ids_BJN = jnp.where((jnp.arange(N) == n)[None, None], token_BJ[..., None], ids_BJN)
    ends_BJ = (token_BJ == EOS_ID) | (token_BJ == BOS_ID)
    nats_BW, live_BW = jax.lax.top_k(jnp.where(ends_BJ, -jnp.inf, nats_BJ), W)
    # An end counts among the W likeliest alone: so one beam without a penalty is greedy decoding.
    ends_BJ &= (jnp.arange(J) < W)[None]
    score_BJ = jnp.where(ends_BJ, nats_BJ / penalty(n + 1, searching), -jnp.inf)
    score_BW, ended_BW = jax.lax.top_k(jnp.concatenate([beams.ended_score_BW, score_BJ], axis=1), W)
    ended_nats_BW = jnp.take_along_axis(jnp.concatenate([beams.ended_nats_BW, nats_BJ], axis=1), ended_BW, axis=1)
    both_ids = jnp.concatenate([beams.ended_ids_BWN, ids_BJN], axis=1)
    ended_ids_BWN = jnp.take_along_axis(both_ids, ended_BW[..., None], axis=1)
    ids_BWN = jnp.take_along_axis(ids_BJN, live_BW[..., None], axis=1)
    token_BW, beam_BW = (jnp.take_along_axis(x_BJ, live_BW, axis=1) for x_BJ in (token_BJ, at_BJ // J))
    from_BW = jnp.arange(B)[:, None] * W + beam_BW
    after = Beams(nats_BW, ids_BWN, score_BW, ended_nats_BW, ended_ids_BWN)
    return after, token_BW.reshape(B * W), from_BW.reshape(B * W)


def _texts(beams: Beams, over: bool, searching: Searching) -> list[Text]:
    """One prompt's texts, the best first; its search is over, or max_tokens have ended it."""
    own = functools.partial(itertools.takewhile, lambda i: i not in ENDS)
    texts = [
        Text(list(own(ids)), nats, score, ended=True)
        for ids, nats, score in zip(
            beams.ended_ids_BWN.tolist(), beams.ended_nats_BW.tolist(), beams.ended_score_BW.tolist(), strict=True
        )
        if score > -np.inf
    ]
    if not over:
        divisor = float(penalty(searching.max_tokens, searching))
        live = zip(beams.ids_BWN.tolist(), beams.nats_BW.tolist(), strict=True)
        texts += [Text(ids, nats, nats / divisor, ended=False) for ids, nats in live if nats != -np.inf]
    return sorted(texts, key=lambda text: -text.score)[: searching.beams]
