"""What depends on the platform, settled once, at start, and printed: nothing falls back silently later on."""

from llm_jax.config import ConfigError
from llm_jax.model.config import ModelConfig
from llm_jax.model.moe import resolve_moe


def resolve(cfg: ModelConfig, platform: str, expert_axis: int) -> ModelConfig:
    """The config with every `auto` settled for a platform (cpu, gpu, tpu) and a size of mesh.expert.

    Raises ConfigError, with the alternatives, for what the platform does not have.
    """
    on_cpu = platform == "cpu"
    settled: dict[str, object] = {
        "attention": _attention(cfg, platform),
        "logit_chunk": cfg.logit_chunk or (2**21 if on_cpu else 2**28),
    }
    if cfg.moe is not None:
        settled["moe"] = resolve_moe(cfg.moe, platform, expert_axis)
    return cfg.model_copy(update=settled)


def _attention(cfg: ModelConfig, platform: str) -> str:
    """The backend. Raises ConfigError where a kernel is asked for that cannot be had."""
    if cfg.attention == "auto":
        kernel = {"tpu": "splash", "gpu": "flash"}.get(platform)
        return "chunked" if kernel is None else "xla" if _lacks(kernel, cfg, platform) else kernel
    lacks = _lacks(cfg.attention, cfg, platform)
    if lacks:
        others = [kernel for kernel in ("splash", "flash") if not _lacks(kernel, cfg, platform)]
        there_are = ", ".join(["xla", *others]) + " and chunked"
        raise ConfigError(f"model.attention = {cfg.attention} {lacks}; there are {there_are}")
    return cfg.attention


def _lacks(backend: str, cfg: ModelConfig, platform: str) -> str:
    """Why it cannot be this one; nothing where it can."""
    match backend:
        case "splash" if platform != "tpu":
            return f"is a kernel for TPUs, and this is a {platform}"
        case "flash" if platform != "gpu":
            return f"is a kernel for GPUs, and this is a {platform}"
        case "splash" | "flash" if cfg.global_tokens:
            return "knows no model.global_tokens"
        case "splash" if cfg.d_head > 128 and cfg.d_head % 128:
            return f"has no model.d_head = {cfg.d_head}: up to 128, or a multiple of it"
        case "flash":
            from llm_jax.model.flash_tiles import MOST_CHANNELS

            return f"has no model.d_head = {cfg.d_head}: up to {MOST_CHANNELS}" if cfg.d_head > MOST_CHANNELS else ""
    return ""


def told(cfg: ModelConfig) -> dict[str, str]:
    """The settled choices by name, to be printed and recorded."""
    choices = {"attention": cfg.attention, "compute_dtype": cfg.compute_dtype}
    if cfg.moe is not None:
        choices |= {"exchange": cfg.moe.exchange, "grouped_matmul": cfg.moe.grouped_matmul}
    return choices
