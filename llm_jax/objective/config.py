"""The objective's section of a run."""

from typing import Annotated, Literal

import pydantic
from annotated_types import Ge, Gt, Le, Lt

from llm_jax.config import Config, ConfigError


class CausalConfig(Config):
    """Next-token prediction."""

    name: Literal["causal"] = "causal"
    """The objective."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """Coefficient of the squared log-normaliser (PaLM, Chowdhery et al. 2022); 1e-4 is usual, 0 is off."""


class MlmConfig(Config):
    """Masked-language modelling (BERT, Devlin et al. 2018): masked tokens are predicted from both sides."""

    name: Literal["mlm"] = "mlm"
    """The objective."""
    rate: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of a row's tokens that is predicted; 0.15 is BERT's, 0.3 ModernBERT's."""
    mask_share: Annotated[float, Ge(0), Le(1)] = 0.8
    """Of the predicted tokens, the share that the model sees as the mask."""
    random_share: Annotated[float, Ge(0), Le(1)] = 0.1
    """Of the predicted tokens, the share that it sees as a random piece; it sees the rest as they are."""
    unit: Literal["token", "word", "span"] = "token"
    """What is masked as a whole: tokens, words, or spans of random length (SpanBERT, Joshi et al. 2019)."""
    span_mean: Annotated[float, Ge(1)] = 3.0
    """Mean length of a span in tokens."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """Coefficient of the squared log-normaliser (PaLM, Chowdhery et al. 2022); 1e-4 is usual, 0 is off."""


ObjectiveConfig = Annotated[CausalConfig | MlmConfig, pydantic.Field(discriminator="name")]


def check(objective: CausalConfig | MlmConfig) -> None:
    """Raises ConfigError where two fields contradict each other."""
    if isinstance(objective, MlmConfig) and objective.mask_share + objective.random_share > 1:
        raise ConfigError(
            f"objective.mask_share + objective.random_share = {objective.mask_share + objective.random_share:g} "
            "is more than 1"
        )
