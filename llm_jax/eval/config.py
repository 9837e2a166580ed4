"""The evaluation's section of a run."""

from typing import Annotated

from annotated_types import Ge

from llm_jax.config import Config, ConfigError


class EvalConfig(Config):
    """Looking at held-out text during training, and scoring it afterwards."""

    every: Annotated[int, Ge(0)] = 0
    """Evaluate on validation rows after every so many updates; 0 is off."""
    rows: Annotated[int, Ge(1)] = 128
    """Validation rows looked at each time (the first so many, always the same)."""
    batch_rows: Annotated[int, Ge(1)] = 16
    """Rows of one forward pass of an evaluation."""
    stride: Annotated[int, Ge(1)] | None = None
    """Tokens by which `llm-jax eval`'s windows move on; null is half of data.seq_len. A masked model has no windows."""
    pseudo_tokens: Annotated[int, Ge(1)] = 2000
    """Held-out tokens, drawn from the run's seed, of a masked model's pseudo-perplexity: a forward each, twice."""

    def check(self, seq_len: int) -> None:
        """Raises ConfigError where windows would leave tokens out."""
        if self.stride is not None and self.stride > seq_len:
            raise ConfigError(
                f"eval.stride = {self.stride} is more than data.seq_len = {seq_len}; windows would leave tokens out"
            )
