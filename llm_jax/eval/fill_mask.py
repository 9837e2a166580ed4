"""`llm-jax fill-mask`: the likeliest pieces at each [MASK] of a text, by a masked language model."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, P

from llm_jax.config import ConfigError
from llm_jax.data.config import MASK_ID, PAD_ID, SPECIAL_PIECES
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.evaluation import opened, whole_batch, write
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.requests import lengths
from llm_jax.eval.restore import restore_weights
from llm_jax.eval.scorer import on_mesh
from llm_jax.guards import Stop, never
from llm_jax.mesh import acts
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Weights, abstract_model, logits
from llm_jax.objective.loss import at_places

# How a mask is typed. The tokenizer spells the same characters as any others.
MASK = "[MASK]"


class Asked(NamedTuple):
    """Texts with [MASK] in them, and how many pieces to tell for each."""

    texts: Sequence[str]
    top: int = 5
    as_json: bool = False
    from_stdin: bool = False
    """Only one process can have read the texts."""


class Question(NamedTuple):
    """A text's ids, BOS first, and the places of its masks."""

    ids: Sequence[int]
    places: Sequence[int]


class Guess(NamedTuple):
    """A piece at a mask, and its probability."""

    id: int
    probability: float


# Weights and a batch of questions -> the likeliest ids and their probabilities, [B, N, top].
Guesses = Callable[[Weights, Sequence[Question]], tuple[np.ndarray, np.ndarray]]


def fill_mask(run_dir: str, step: int | None, overrides: Sequence[str], asked: Asked, stop: Stop = never) -> None:
    """Prints the likeliest pieces at each mask and the text with the first of each, or a line of JSON for each text.

    stop is asked before each batch, and must answer alike on all processes. Needs the job's processes joined.
    Raises Refused for a causal language model, ConfigError for a text that the model cannot see as a whole, and where
    several processes would have to read standard input; NotFinite.
    """
    if asked.from_stdin and jax.process_count() > 1:
        raise ConfigError("--texts -: only one process could read standard input; give a file that all can read")
    with opened(run_dir, step, overrides, fills=True) as (found, run, mesh):
        questions = [question_of(found.tokenizer, text, run.data.seq_len) for text in asked.texts]
        weights = restore_weights(found, run.model, mesh)
        size = whole_batch(run, mesh)
        guesses = make_guesses(run.model, asked.top, run.data.seq_len, size)
        for first in range(0, len(questions), size):
            if stop():
                return
            batch = questions[first : first + size]
            for text, question, *told in zip(asked.texts[first:], batch, *guesses(weights, batch), strict=False):
                _tell(asked, text, question, _by_mask(question, *told), found.tokenizer)


def question_of(tokenizer: Tokenizer, text: str, seq_len: int) -> Question:
    """The text with its masks, as one document. Raises ConfigError where it has none, or is too long.

    As pieces bring the space in front of them, one space before a mask is part of what is asked for; those that indent
    a line are not.
    """
    parts = text.split(MASK)
    if len(parts) == 1:
        raise ConfigError(f"--text {text!r}: has no {MASK}")
    for n, part in enumerate(parts[:-1]):
        before = part[-2:-1] or ("" if n == 0 else MASK)
        if part.endswith(" ") and before not in ("", " ", "\n"):
            parts[n] = part[:-1]
    ids = [tokenizer.bos_id, *tokenizer.encode(parts[0]).tolist()]
    places = []
    for part in parts[1:]:
        places.append(len(ids))
        ids += [MASK_ID, *tokenizer.encode(part).tolist()]
    if len(ids) > seq_len:
        raise ConfigError(
            f"--text {text[:40]!r}...: has {len(ids)} tokens, and the model sees {seq_len} at once; give less of it"
        )
    return Question(ids, places)


def make_guesses(cfg: ModelConfig, top: int, seq_len: int, batch_rows: int) -> Guesses:
    """The function from at most batch_rows questions to guesses, compiled once for each shape; all processes get all.

    Each mask is guessed for itself, the others being masks too. Control ids are no guesses, but have their probability.
    cfg's attention is resolved, the mesh is set. Raises NotFinite.
    """
    graph, mesh = abstract_model(cfg).graph, jax.sharding.get_mesh()
    parts = mesh.shape["context"]
    kept = min(top, cfg.vocab_size - len(SPECIAL_PIECES))

    @jax.jit
    def guess(
        weights: Weights, tokens_BT: Array, segments_BT: Array, positions_BT: Array, places_BN: Array
    ) -> tuple[Array, Array]:
        model = nnx.merge(graph, *weights)
        x_BTD, _ = model(tokens_BT, segments_BT, positions_BT, cfg, causal=False)
        # The vocabulary comes together over tensor here.
        logits_BNV = jax.reshard(logits(model, at_places(x_BTD, places_BN), cfg), acts("BND"))
        share_BNV = jax.reshard(jax.nn.softmax(logits_BNV.astype(jnp.float32), axis=-1), P())
        v_V = jnp.arange(share_BNV.shape[-1])
        is_text_V = (v_V >= len(SPECIAL_PIECES)) & (v_V < cfg.vocab_size)
        return jax.lax.top_k(jnp.where(is_text_V[None, None], share_BNV, -1.0), kept)

    def guesses(weights: Weights, batch: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
        longest, most = (max(map(len, each)) for each in zip(*batch, strict=True))
        T = next(length for length in lengths(seq_len, parts) if length >= longest)
        N = parts * 2 ** (-(-most // parts) - 1).bit_length()
        tokens_BT = np.full((batch_rows, T), PAD_ID, np.int32)
        segments_BT, positions_BT = np.zeros((2, batch_rows, T), np.int32)
        places_BN = np.zeros((batch_rows, N), np.int32)
        for b, (ids, places) in enumerate(batch):
            tokens_BT[b, : len(ids)], segments_BT[b, : len(ids)] = ids, 1
            positions_BT[b], places_BN[b, : len(places)] = np.arange(T), places
        share_BNX, ids_BNX = jax.device_get(
            guess(weights, *map(on_mesh, (tokens_BT, segments_BT, positions_BT, places_BN)))
        )
        if not np.isfinite(share_BNX[: len(batch)]).all():
            raise NotFinite("the model's scores are not numbers: its weights are broken; try an earlier --step")
        return ids_BNX, share_BNX

    return guesses


def _by_mask(question: Question, ids_NX: np.ndarray, share_NX: np.ndarray) -> list[list[Guess]]:
    """The guesses at each of the text's masks."""
    rows = zip(ids_NX.tolist(), share_NX.tolist(), strict=True)
    told = [[Guess(*guess) for guess in zip(*row, strict=True)] for row in rows]
    return told[: len(question.places)]


def _tell(asked: Asked, text: str, question: Question, masks: Sequence[Sequence[Guess]], tokenizer: Tokenizer) -> None:
    ids = list(question.ids)
    for place, guesses in zip(question.places, masks, strict=True):
        ids[place] = guesses[0].id
    filled = tokenizer.decode(ids)
    told: list[list[dict[str, Any]]] = [
        [{"piece": tokenizer.decode([guess.id]), **guess._asdict()} for guess in guesses] for guesses in masks
    ]
    if asked.as_json:
        write(json.dumps({"text": text, "masks": told, "filled": filled}) + "\n")
        return
    write(f"{text}\n")
    for n, guesses in enumerate(told, start=1):
        if len(told) > 1:
            write(f"{MASK} {n}, the others hidden too:\n")
        for guess in guesses:
            write(f"  {guess['probability']:.4f}  {guess['piece']!r}\n")
    write(f"{filled}\n\n")
