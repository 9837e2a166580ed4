"""The objective's section of a run."""

from typing import Annotated, Literal

from annotated_types import Ge

from llm_jax.config import Config


class CausalConfig(Config):
    """Next-token prediction."""

    name: Literal["causal"] = "causal"
    """The objective."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """Coefficient of the squared log-normaliser (PaLM, Chowdhery et al. 2022); 1e-4 is usual, 0 is off."""


ObjectiveConfig = CausalConfig
