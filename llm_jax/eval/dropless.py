"""Experts as held-out text is looked at: none of them ever drops a token."""

from llm_jax.model.config import ModelConfig


def dropless(cfg: ModelConfig) -> ModelConfig:
    """The config without a capacity, which would couple the tokens of a batch; the weights are the same ones.

    Where there was one, how experts work is to be settled anew.
    """
    if cfg.moe is None or cfg.moe.capacity_factor is None:
        return cfg
    update = {"capacity_factor": None, "grouped_matmul": "auto", "exchange": "auto"}
    return cfg.model_copy(update={"moe": cfg.moe.model_copy(update=update)})
