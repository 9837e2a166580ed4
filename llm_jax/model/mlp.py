"""The MLP of a dense layer, and of what every token passes beside its experts."""

from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llm_jax.mesh import acts
from llm_jax.model.activation import activate
from llm_jax.model.config import ModelConfig
from llm_jax.model.weights import Weight, matrix, plus, project, residual_scale, stored, zeros


class Mlp(nnx.Module):
    """A gated MLP (three matrices) or a plain one (two), of any width, with or without biases."""

    gate_bias: Weight | None
    up_bias: Weight | None
    down_bias: Weight | None

    def __init__(self, cfg: ModelConfig, d_ff: int, rngs: nnx.Rngs, *, biased: bool):
        dims = {"D": cfg.d_model, "F": d_ff}
        if cfg.gated:
            self.gate = matrix("DF", dims, rngs, fan_in="D")
        self.up = matrix("DF", dims, rngs, fan_in="D")
        self.down = matrix("FD", dims, rngs, fan_in="F", scale=residual_scale(cfg))
        self.gate_bias = zeros("F", dims) if biased and cfg.gated else None
        self.up_bias = zeros("F", dims) if biased else None
        self.down_bias = zeros("D", dims) if biased else None

    def __call__(self, x_BTD: Array, cfg: ModelConfig) -> Array:
        """x_BTD in the compute type; returns the MLP's part of the sum."""
        up_BTF = plus(project("BTD,DF->BTF", x_BTD, stored(self.up, cfg)), self.up_bias)
        up_BTF, gate_BTF = checkpoint_name(up_BTF, "mlp_up"), None
        if cfg.gated:
            gate_BTF = plus(project("BTD,DF->BTF", x_BTD, stored(self.gate, cfg)), self.gate_bias)
            gate_BTF = checkpoint_name(gate_BTF, "mlp_gate")
        hidden_BTF = activate(cfg, gate_BTF, up_BTF)
        y_BTD: Array = project("BTF,FD->BTD", hidden_BTF, stored(self.down, cfg), out_sharding=acts("BTD"))
        return plus(y_BTD, self.down_bias)
