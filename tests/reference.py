"""A transformer of every kind but experts, written in NumPy float64 from the papers, a row and a layer at a time."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from llm_jax.data.config import BOS_ID
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.model.paths import to_tree


class Reference:
    """Logits [T, vocab_size] of a row, from the weights as a checkpoint names them."""

    def __init__(self, cfg: ModelConfig, params: nnx.State):
        self.cfg = cfg
        self.params: dict[str, Any] = jax.tree.map(lambda x: np.asarray(x, np.float64), to_tree(params))

    def __call__(self, row: np.ndarray, causal: bool = True) -> np.ndarray:
        cfg, p = self.cfg, self.params
        starts, index = row == BOS_ID, np.arange(len(row))
        segments = np.cumsum(starts)
        positions = index - np.maximum.accumulate(np.where(starts, index, 0))
        x = p["embed"][row]
        if cfg.learned_positions:
            x = x + p["positions"][np.minimum(positions, cfg.learned_positions - 1)]
        if cfg.token_types:
            x = x + p["types"][0]
        if cfg.embedding_norm:
            x = self.norm(x, p["embedding_norm"])
        for i, layer in enumerate(cfg.layers):
            x = self.layer(x, p["layers"][str(i)], layer, self.seen(segments, positions, layer, causal), positions)
        if cfg.norm_place != "post":
            x = self.norm(x, p["norm"])
        return self.head(x)

    def layer(self, x: np.ndarray, p: dict, layer: LayerConfig, seen: np.ndarray, positions: np.ndarray) -> np.ndarray:
        def attend(x: np.ndarray) -> np.ndarray:
            return self.attend(x, p["attention"], layer, seen, positions)

        for half, name in ((attend, "attention"), (lambda x: self.mlp(x, p["mlp"]), "mlp")):
            inside = x
            if self.cfg.norm_place != "post" and (name == "mlp" or layer.attention_norm):
                inside = self.norm(x, p[f"{name}_norm"])
            match self.cfg.norm_place:
                case "pre":
                    x = x + half(inside)
                case "post":
                    x = self.norm(x + half(inside), p[f"{name}_out_norm"])
                case "sandwich":
                    x = x + self.norm(half(inside), p[f"{name}_out_norm"])
        return x

    def norm(self, x: np.ndarray, p: dict) -> np.ndarray:
        if self.cfg.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.cfg.norm_eps) * p["scale"] + p.get("bias", 0)

    def seen(self, segments: np.ndarray, positions: np.ndarray, layer: LayerConfig, causal: bool) -> np.ndarray:
        t, s = positions[:, None], positions[None]
        seen = (segments[:, None] == segments) & ((s <= t) | (not causal))
        if layer.window is not None:
            seen &= (t - s < layer.window) if causal else (abs(t - s) <= layer.window // 2)
        if layer.block is not None:
            seen &= (t // layer.block == s // layer.block) | (np.minimum(t, s) < self.cfg.global_tokens)
        return seen

    def turn(self, x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
        half = self.cfg.d_head // 2
        turns = np.exp(1j * positions[:, None] * theta ** (-np.arange(half) / half))
        z = (x[..., :half] + 1j * x[..., half:]) * turns[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def qk_norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        axes = (-1,) if self.cfg.qk_norm_over == "head" else (-2, -1)
        return x / np.sqrt(np.mean(x**2, axes, keepdims=True) + self.cfg.norm_eps) * scale

    def attend(self, x: np.ndarray, p: dict, layer: LayerConfig, seen: np.ndarray, positions: np.ndarray) -> np.ndarray:
        cfg = self.cfg
        q, k, v = (np.einsum("td,dhc->thc", x, p[name]) + p.get(f"{name}_bias", 0) for name in "qkv")
        if cfg.qk_norm:
            q, k = self.qk_norm(q, p["q_norm"]), self.qk_norm(k, p["k_norm"])
        if not cfg.learned_positions:
            q, k = (self.turn(x, positions, layer.rope_theta or cfg.rope_theta) for x in (q, k))
        k, v = (np.repeat(x, cfg.n_heads // cfg.n_kv_heads, axis=1) for x in (k, v))
        scores = np.einsum("thc,shc->hts", q, k) / math.sqrt(cfg.d_head)
        if cfg.attention_soft_cap is not None:
            scores = cfg.attention_soft_cap * np.tanh(scores / cfg.attention_soft_cap)
        sizes = np.where(seen, np.exp(scores), 0)
        total = sizes.sum(-1, keepdims=True)
        if cfg.attention_sinks:
            total = total + np.exp(p["sinks"])[:, None, None]
        return np.einsum("hts,shc,hcd->td", sizes / total, v, p["o"]) + p.get("o_bias", 0)

    def mlp(self, x: np.ndarray, p: dict) -> np.ndarray:
        up = x @ p["up"] + p.get("up_bias", 0)
        gate = x @ p["gate"] + p.get("gate_bias", 0) if self.cfg.gated else up
        hidden = {
            "swiglu": lambda: gate / (1 + np.exp(-gate)) * up,
            "geglu": lambda: gelu(gate) * up,
            "gelu": lambda: gelu(up),
            "gelu_tanh": lambda: 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))),
        }[self.cfg.mlp]()
        return hidden @ p["down"] + p.get("down_bias", 0)

    def head(self, x: np.ndarray) -> np.ndarray:
        cfg, p = self.cfg, self.params
        if cfg.head_transform:
            transform = p["head_transform"]
            x = self.norm(gelu(x @ transform["dense"] + transform.get("dense_bias", 0)), transform["norm"])
        table = p["embed"] if cfg.tied_embeddings else p["unembed"]
        out = (x @ table.T + p.get("output_bias", 0))[:, : cfg.vocab_size]
        return out if cfg.logit_soft_cap is None else cfg.logit_soft_cap * np.tanh(out / cfg.logit_soft_cap)


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the share of a standard normal below it."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
