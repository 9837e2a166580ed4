"""What depends on the platform, settled once, at start, and printed: nothing falls back silently later on."""

from llm_jax.model.config import ModelConfig
from llm_jax.model.moe import resolve_moe


def resolve(cfg: ModelConfig, platform: str, expert_axis: int) -> ModelConfig:
    """The config with every `auto` settled for a platform (cpu, gpu, tpu) and a size of mesh.expert.

    Raises ConfigError, with the alternatives, for what the platform does not have.
    """
    on_cpu = platform == "cpu"
    settled = {"attention": cfg.attention, "logit_chunk": cfg.logit_chunk or (2**21 if on_cpu else 2**28)}
    if cfg.attention == "auto":
        settled["attention"] = "chunked" if on_cpu else "xla"
    if cfg.moe is not None:
        settled["moe"] = resolve_moe(cfg.moe, platform, expert_axis)
    return cfg.model_copy(update=settled)


def told(cfg: ModelConfig) -> dict[str, str]:
    """The settled choices by name, to be printed and recorded."""
    choices = {"attention": cfg.attention, "compute_dtype": cfg.compute_dtype}
    if cfg.moe is not None:
        choices |= {"exchange": cfg.moe.exchange, "grouped_matmul": cfg.moe.grouped_matmul}
    return choices
