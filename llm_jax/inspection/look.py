"""`llm-jax inspect`: a checkpoint is opened, a text is read by it, and a page is written on what happened inside."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from llm_jax import exit_codes
from llm_jax.eval.evaluation import opened, whole_batch
from llm_jax.eval.inside import in_float32, look_inside
from llm_jax.eval.restore import for_decoding, restore_weights
from llm_jax.guards import Stop, never
from llm_jax.inspection.page import Subject, render
from llm_jax.model.config import ModelConfig
from llm_jax.objective.config import CausalConfig

# A page holds no more tokens than this, and no more numbers of attention than that: some fifteen megabytes.
MOST_TOKENS = 256
MOST_SHARES = 2**24
# Far more than a token has: what comes later in a text, which may be a large file, is not even encoded.
CHARACTERS = 64


class PageError(exit_codes.Failure):
    """The page cannot be written."""

    exit_code = exit_codes.CHECKPOINT


def inspect_checkpoint(
    run_dir: str, step: int | None, overrides: Sequence[str], text: str, out: Path | None, stop: Stop = never
) -> None:
    """Writes the page, to inspect.html in the run's directory unless told where, and prints its path.

    A text that is longer than a page is cut, which stderr says. stop is asked before each batch, and must answer alike
    on all processes. Needs the job's processes joined. Raises NotFinite and PageError.
    """
    with opened(run_dir, step, overrides) as (found, run, mesh):
        room = most_tokens(run.model, run.data.seq_len) - 1
        ids = found.tokenizer.encode(text[: CHARACTERS * room]).tolist()
        if len(ids) > room and jax.process_index() == 0:
            print(f"the text is longer than a page; its first {room} tokens are shown", file=sys.stderr)
        shown = [found.tokenizer.bos_id, *ids[:room]]
        causal = isinstance(run.objective, CausalConfig)
        weights = restore_weights(found, run.model, mesh)
        with for_decoding(weights, in_float32(run.model)) as (weights, cfg):
            rows = whole_batch(run, jax.sharding.get_mesh())
            inside = look_inside(weights, cfg, shown, causal=causal, batch_rows=rows, stop=stop)
    if inside is None or jax.process_index() > 0:
        return
    path = out or Path(run_dir, "inspect.html")
    subject = Subject(run.name, found.step, run.model, causal, found.tokenizer, shown, len(ids) > room)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(subject, inside), encoding="utf-8")
    except OSError as error:
        raise PageError(f"{error.filename or path} cannot be written: {error.strerror}") from None
    print(path)


def most_tokens(cfg: ModelConfig, seq_len: int) -> int:
    """Tokens that a page shows, BOS among them: what the model was trained to read at once, as far as a page holds."""
    by_heads = math.isqrt(MOST_SHARES // (cfg.n_layers * cfg.n_heads))
    return max(min(seq_len, cfg.learned_positions or seq_len, MOST_TOKENS, by_heads), 2)
