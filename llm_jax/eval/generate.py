"""Text from a model, token by token, each by a full forward pass over the row so far."""

import codecs
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, P

from llm_jax.data.config import PAD_ID
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.restore import row_parts
from llm_jax.eval.scorer import on_mesh
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights, abstract_model, logits

# Rows are this long, twice this, four times ... and at last as long as in training: few shapes, few compiles.
SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is drawn: temperature 0 takes the likeliest token; a seed gives the same text on every mesh."""

    max_tokens: int
    temperature: float
    seed: int


NextToken = Callable[[Weights, Sequence[int], Sampling, int], int]


def make_next_token(cfg: ModelConfig, seq_len: int) -> NextToken:
    """The function (weights, ids so far, sampling, row) -> the next id, seeing the last seq_len ids.

    The draw's key is a function of the seed, the row and the position. The mesh is set, cfg's attention resolved.
    """
    graph = abstract_model(cfg).graph
    mesh = jax.sharding.get_mesh()
    # The mesh's row axes need that many rows; all of them are the same one.
    B = row_parts(mesh)

    @jax.jit
    def draw(
        weights: Weights, tokens_BT: Array, last: Array, temperature: Array, seed: Array, row: Array, position: Array
    ) -> Array:
        model = nnx.merge(graph, *weights)
        positions_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1, out_sharding=acts("BT"))
        # What follows the last token is padding, and no token sees what follows it.
        x_BTD, _ = model(tokens_BT, jnp.zeros_like(tokens_BT), positions_BT, cfg, causal=True)
        x_BSD = jax.reshard(x_BTD, acts("BSD"))
        last_BSD = jax.lax.dynamic_slice_in_dim(x_BSD, last, 1, axis=1)
        logits_V = jax.reshard(logits(model, last_BSD, cfg), P())[0, 0]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        drawn = jax.random.categorical(key, logits_V / jnp.where(temperature > 0, temperature, 1))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)

    def next_token(weights: Weights, ids: Sequence[int], sampling: Sampling, row: int) -> int:
        seen = np.asarray(ids[-seq_len:], np.int32)
        T = row_length(len(seen), seq_len, mesh.shape["context"])
        tokens_T = np.pad(seen, (0, T - len(seen)), constant_values=PAD_ID)
        tokens_BT = on_mesh(np.broadcast_to(tokens_T, (B, T)))
        last, temperature = np.int32(len(seen) - 1), np.float32(sampling.temperature)
        where = (np.int32(sampling.seed), np.int32(row), np.int32(len(ids)))
        return int(jax.device_get(draw(weights, tokens_BT, last, temperature, *where)))

    return next_token


def row_length(n: int, seq_len: int, parts: int) -> int:
    """The shortest row for n tokens, n <= seq_len: a multiple of parts, which divides seq_len."""
    length = SHORTEST
    while length < n:
        length *= 2
    return min(-(-length // parts) * parts, seq_len)


def stream(
    next_token: NextToken, weights: Weights, tokenizer: Tokenizer, prompt: str, sampling: Sampling, row: int = 0
) -> Iterator[str]:
    """The prompt's continuation, in pieces as they come; it ends after max_tokens, or where a document ends or begins.

    row: the number of the prompt among others, so that each has its own randomness. Raises ValueError where the prompt
    has lone surrogates.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    # A character may be spelled by several tokens.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for _ in range(sampling.max_tokens):
        token = next_token(weights, ids, sampling, row)
        if token in (tokenizer.eos_id, tokenizer.bos_id):
            break
        ids.append(token)
        yield decoder.decode(tokenizer.piece_texts[token])
    yield decoder.decode(b"", final=True)


def sample(
    next_token: NextToken, weights: Weights, tokenizer: Tokenizer, prompt: str, sampling: Sampling, row: int = 0
) -> str:
    """The prompt's continuation as a whole; see `stream`."""
    return "".join(stream(next_token, weights, tokenizer, prompt, sampling, row))
