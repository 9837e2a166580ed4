"""Text from a model: prompts are read once, then tokens come in chunks from a loop on the device, with a cache."""

import codecs
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, NamedSharding, P

from llm_jax.data.config import BOS_ID, EOS_ID, PAD_ID
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.restore import row_parts
from llm_jax.eval.sampling import Sampling, draw, row_keys
from llm_jax.eval.scorer import on_mesh
from llm_jax.mesh import acts
from llm_jax.model import decode
from llm_jax.model.config import ModelConfig
from llm_jax.model.decode import Cache
from llm_jax.model.transformer import Weights, abstract_model

# Prompts and caches are this long, twice this, four times ...: few shapes, few compiles.
SHORTEST = 64
# Tokens that the device makes before the host looks at them.
CHUNK = 16
# A text ends where its document ends or another begins.
ENDS = (EOS_ID, BOS_ID)


class Prompt(NamedTuple):
    """The ids so far, BOS first, and the number by which a text's randomness is told from others'."""

    ids: Sequence[int]
    row: int


class Going(NamedTuple):
    """Rows under way; all arrays but t are divided over the mesh by rows."""

    t: Array
    """The place in the rows of the next token, int32 scalar."""
    logits_BV: Array
    cache: Cache
    seen_BV: Array | None
    """Which tokens are there, where that matters."""
    done_B: Array
    row_B: Array
    gone_B: Array
    """Tokens of each text that are no longer in its row; places are counted without them, positions of draws with."""


class Piece(NamedTuple):
    """What a text gets from one turn of the device."""

    ids: list[int]
    nats: list[float]
    """Log-likelihood of each id under the model as it is, unfiltered; one more where the text ended by itself."""
    ended: bool


class Decoder(NamedTuple):
    """The compiled parts of decoding; `make_decoder` makes them."""

    begin: Callable[..., Going]
    go_on: Callable[[Weights, Going, np.int32], tuple[Going, Array, Array, Array]]
    sampling: Sampling
    seq_len: int
    learned_positions: int
    padded_vocab: int


def make_decoder(cfg: ModelConfig, seq_len: int, sampling: Sampling) -> Decoder:
    """For weights of `decode.unrolled(cfg)`'s structure; a token sees the last seq_len at most. The mesh is set.

    Raises ConfigError where the mesh has a context axis.
    """
    decode.check_mesh(jax.sharding.get_mesh())
    programs = _programs(cfg, sampling)  # pyright: ignore[reportArgumentType]  frozen configs have a hash
    return Decoder(*programs, sampling, seq_len, cfg.learned_positions, cfg.dims["V"])


@functools.cache
def _programs(cfg: ModelConfig, sampling: Sampling) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Decoder's `begin` and `go_on`: the same functions for the same model, so that other weights compile nothing."""
    graph = abstract_model(cfg).graph

    def begin(
        weights: Weights,
        tokens_BT: Array,
        start_B: Array,
        from_B: Array,
        row_B: Array,
        gone_B: Array,
        seen_BV: Array | None,
        slots: int,
    ) -> Going:
        """Reads the prompts; texts that begin alike (from_B: the prompt's row, for each text) share the reading."""
        logits_BV, cache = decode.prefill(nnx.merge(graph, *weights), tokens_BT, start_B, slots, cfg)
        logits_BV, cache = decode.rows_of((logits_BV, cache), from_B)
        return Going(jnp.int32(tokens_BT.shape[1]), logits_BV, cache, seen_BV, row_B < 0, row_B, gone_B)

    def go_on(weights: Weights, going: Going, limit: Array) -> tuple[Going, Array, Array, Array]:
        """At most CHUNK tokens more, and none from place `limit` on: new_BN, their nats_BN, and done_B, everywhere."""
        model, first = nnx.merge(graph, *weights), going.t

        def unfinished(carry: tuple[Going, Array, Array]) -> Array:
            going, *_ = carry
            return (going.t < jnp.minimum(first + CHUNK, limit)) & ~jnp.all(going.done_B)

        def one(carry: tuple[Going, Array, Array]) -> tuple[Going, Array, Array]:
            going, new_BN, nats_BN = carry
            position_B = going.t - going.cache.start_B + going.gone_B
            keys_B = row_keys(jnp.int32(sampling.seed), going.row_B, position_B)
            drawn_B = draw(going.logits_BV, going.seen_BV, keys_B, sampling)
            token_B = jnp.where(going.done_B, EOS_ID, drawn_B)
            done_B = going.done_B | (token_B == EOS_ID) | (token_B == BOS_ID)
            if cfg.learned_positions:
                done_B |= going.t + 1 - going.cache.start_B >= cfg.learned_positions
            is_token_BV = token_B[:, None] == jnp.arange(going.logits_BV.shape[1])[None]
            here_N = jnp.arange(CHUNK) == going.t - first
            new_BN = jnp.where(here_N[None], token_B[:, None], new_BN)
            nats_BN = jnp.where(here_N[None], _nats(going.logits_BV, is_token_BV)[:, None], nats_BN)
            seen_BV = None if going.seen_BV is None else going.seen_BV | is_token_BV
            logits_BV, cache = decode.step(model, token_B, going.t, going.cache, cfg)
            after = Going(going.t + 1, logits_BV, cache, seen_BV, done_B, going.row_B, going.gone_B)
            return after, new_BN, nats_BN

        nothing_BN = jnp.zeros_like(going.row_B)[:, None] + jnp.full(CHUNK, EOS_ID, jnp.int32)[None]
        going, new_BN, nats_BN = jax.lax.while_loop(unfinished, one, (going, nothing_BN, nothing_BN * 0.0))
        return going, *jax.reshard((new_BN, nats_BN, going.done_B), P())

    return jax.jit(begin, static_argnums=7), jax.jit(go_on, donate_argnums=1)


def _nats(logits_BV: Array, is_token_BV: Array) -> Array:
    """The log-likelihood of each row's token."""
    chosen_B = jnp.sum(jnp.where(is_token_BV, logits_BV, 0.0), axis=-1)
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def room(seq_len: int, learned_positions: int, max_tokens: int) -> int:
    """How many ids of a prompt are read: learned positions have to be enough for what follows too."""
    if not learned_positions:
        return seq_len
    return min(seq_len, max(learned_positions - max_tokens, learned_positions // 2))


def decoding(
    decoder: Decoder, weights: Weights, prompts: Sequence[Prompt], chunk: int = CHUNK
) -> Iterator[list[Piece]]:
    """The next piece of every prompt's text, until each has ended or has sampling.max_tokens new ids.

    chunk: at most so many ids at a time. A token sees the last seq_len tokens, by a ring of keys and values. What
    shares a batch makes no difference.
    """
    left = decoder.sampling.max_tokens
    read = room(decoder.seq_len, decoder.learned_positions, left)
    kept = [prompt.ids[-read:] for prompt in prompts]
    T, slots = lengths(kept, left, decoder.seq_len)
    going = _begun(decoder, weights, prompts, kept, T, slots)
    ended = [False] * len(prompts)
    t, limit = T, T + left
    while t < limit and not all(ended):
        made = min(chunk, CHUNK, limit - t)
        going, new_BN, nats_BN, done_B = decoder.go_on(weights, going, np.int32(t + made))
        rows = zip(*(x.tolist() for x in jax.device_get((new_BN, nats_BN, done_B))), ended, strict=False)
        pieces = [_piece(new[:made], nats[:made], done, over) for new, nats, done, over in rows]
        yield pieces
        ended = [piece.ended for piece in pieces]
        t += made


def _piece(new: Sequence[int], nats: list[float], done: bool, over: bool) -> Piece:
    """What is a text's own of a turn's tokens; over: it had ended before."""
    if over:
        return Piece([], [], ended=True)
    ids = list(itertools.takewhile(lambda i: i not in ENDS, new))
    return Piece(ids, nats[: len(ids) + 1], done)


def lengths(kept: Sequence[Sequence[int]], max_tokens: int, seq_len: int) -> tuple[int, int]:
    """How long rows are that hold the prompts, and how many places of the past are kept."""
    longest = max(map(len, kept))
    T = max(min(length(longest), seq_len), longest)
    return T, min(length(T + max_tokens), seq_len)


def aligned(kept: Sequence[Sequence[int]], T: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts aligned at their ends, tokens_BT, and where each begins, start_B; as many rows as the mesh divides."""
    rows = [*kept, *[kept[0]] * (-len(kept) % row_parts(jax.sharding.get_mesh()))]
    tokens_BT = np.full((len(rows), T), PAD_ID, np.int32)
    for row_T, ids in zip(tokens_BT, rows, strict=True):
        row_T[T - len(ids) :] = ids
    return tokens_BT, np.array([T - len(ids) for ids in rows], np.int32)


def _begun(
    decoder: Decoder, weights: Weights, prompts: Sequence[Prompt], kept: Sequence[Sequence[int]], T: int, slots: int
) -> Going:
    """The prompts' last ids on the mesh, and what is the same in them read once."""
    unique = list(dict.fromkeys(tuple(ids) for ids in kept))
    tokens_BT, start_B = aligned(unique, T)
    parts = row_parts(jax.sharding.get_mesh())
    idle = [0] * (-len(prompts) % parts)
    from_B = np.array([unique.index(tuple(ids)) for ids in kept] + idle, np.int32)
    # Rows that only fill up the mesh have ended before they begin.
    row_B = np.array([prompt.row for prompt in prompts] + [-1 for _ in idle], np.int32)
    gone = [len(prompt.ids) - len(ids) for prompt, ids in zip(prompts, kept, strict=True)]
    gone_B = np.array(gone + idle, np.int32)
    seen_BV = None
    if decoder.sampling.remembers:
        seen_BV = np.zeros((len(from_B), decoder.padded_vocab), bool)
        for seen_V, prompt in zip(seen_BV, prompts, strict=False):
            seen_V[list(prompt.ids)] = True
        seen_BV = by_row(seen_BV)
    return decoder.begin(weights, on_mesh(tokens_BT), *map(by_row, (start_B, from_B, row_B, gone_B)), seen_BV, slots)


def by_row(array_B: np.ndarray) -> Array:
    """An array that every process has whole, divided over the set mesh by rows."""
    sharding = NamedSharding(jax.sharding.get_mesh(), acts("B"))
    return jax.make_array_from_callback(array_B.shape, sharding, lambda index: array_B[index])


def length(n: int) -> int:
    """The shortest row for n tokens: SHORTEST, twice that, ..."""
    length = SHORTEST
    while length < n:
        length *= 2
    return length


class Text:
    """New ids as text as far as it is certain: whole characters, and nothing of what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._pieces = tokenizer.piece_texts
        # A character may be spelled by several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """What is certain now; last: nothing follows."""
        if self.stopped:
            return ""
        spelled = b"".join(self._pieces[i] for i in ids)
        self._held += self._decoder.decode(spelled, final=last)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            told, self._held = self._held[: min(found)], ""
            return told
        unsure = 0 if last else max((_begins(self._held, stop) for stop in self._stops), default=0)
        told, self._held = self._held[: len(self._held) - unsure], self._held[len(self._held) - unsure :]
        return told


def _begins(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def streams(
    decoder: Decoder, weights: Weights, tokenizer: Tokenizer, prompts: Sequence[Prompt], stops: Sequence[str] = ()
) -> Iterator[list[str]]:
    """The prompts' continuations, the next piece of each as they come; a text ends before its first stop string."""
    texts = [Text(tokenizer, stops) for _ in prompts]
    for pieces in decoding(decoder, weights, prompts):
        yield [text.add(piece.ids) for text, piece in zip(texts, pieces, strict=True)]
        if all(text.stopped for text in texts):
            return
    yield [text.add([], last=True) for text in texts]


def continued(
    decoder: Decoder, weights: Weights, tokenizer: Tokenizer, prompts: Sequence[Prompt], stops: Sequence[str] = ()
) -> list[str]:
    """The prompts' continuations as a whole; see `streams`."""
    pieces = list(streams(decoder, weights, tokenizer, prompts, stops))
    return ["".join(parts) for parts in zip(*pieces, strict=True)]


def prompt_of(tokenizer: Tokenizer, text: str, row: int = 0) -> Prompt:
    """A text as the beginning of a document. Raises ValueError where it has lone surrogates."""
    return Prompt([tokenizer.bos_id, *tokenizer.encode(text).tolist()], row)
