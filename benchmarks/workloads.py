"""What the benchmarks train: a run a name. W0 to W4 are for CPUs, in float32; the others for accelerators, in bfloat16.

All take AdamW with a constant learning rate and nothing clipped, as the peers they are held against do.
"""

from pathlib import Path

import numpy as np

from llm_jax.config import load
from llm_jax.data.config import BOS_ID, SPECIAL_PIECES, DataConfig
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.objective.config import CausalConfig, MlmConfig, ObjectiveConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import TrainConfig

EXPERTS = LayerConfig(moe=True)


def gated(layers: int, d: int, heads: int, ff: int, vocab: int, experts: int = 0) -> ModelConfig:
    """As Llama; with experts each token takes two of them, and nothing balances their load. In float32."""
    return ModelConfig(
        d_model=d,
        d_ff=ff,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        d_head=d // heads,
        vocab_size=vocab,
        period=(EXPERTS,) if experts else (LayerConfig(),),
        moe=MoeConfig(experts=experts, top_k=2, d_ff=ff, load_balance=0.0, router_z=0.0) if experts else None,
    )


def gpt(layers: int, d: int, heads: int, positions: int, experts: int = 0) -> ModelConfig:
    """As GPT-2; with experts each is half as wide and each token takes two, so that it meets as many weights."""
    return ModelConfig(
        d_model=d,
        d_ff=4 * d,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        d_head=d // heads,
        vocab_size=50_257,
        period=(EXPERTS,) if experts else (LayerConfig(),),
        moe=MoeConfig(experts=experts, top_k=2, d_ff=2 * d) if experts else None,
        mlp="gelu_tanh",
        bias="all",
        tied_embeddings=True,
        learned_positions=positions,
        norm="layernorm",
        norm_bias=True,
        compute_dtype="bfloat16",
    )


MODERNBERT = load(Path(__file__).parents[1] / "configs" / "modernbert_base.py", Run).model
# Four layers as wide as those of Llama 3 8B.
WIDE = ModelConfig(
    d_model=4096,
    d_ff=14_336,
    n_layers=4,
    n_heads=32,
    n_kv_heads=8,
    d_head=128,
    vocab_size=128_256,
    rope_theta=500_000.0,
    compute_dtype="bfloat16",
    remat="full",
)


def run(model: ModelConfig, seq: int, rows: int, objective: ObjectiveConfig) -> Run:
    """rows of seq tokens an update."""
    return Run(
        model=model,
        data=DataConfig(seq_len=seq),
        objective=objective,
        optim=AdamWConfig(lr=3e-4, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=None, schedule="constant"),
        train=TrainConfig(batch_rows=rows),
    )


CAUSAL = CausalConfig()
# W1 to W4 have 4096 tokens an update. Rows of the others are what one GPU of 80 GB holds; train.batch_rows changes it.
WORKLOADS = {
    "W0": run(gated(2, 64, 2, 172, 512), 64, 4, CAUSAL),
    "W1": run(gated(4, 256, 4, 688, 8192), 256, 16, CAUSAL),
    "W2": run(gated(8, 512, 8, 1376, 16384), 512, 8, CAUSAL),
    "W3": run(gated(4, 256, 4, 688, 8192), 256, 16, MlmConfig(rate=0.15)),
    "W4": run(gated(4, 256, 4, 344, 8192, experts=8), 256, 16, CAUSAL),
    "gpt_124m": run(gpt(12, 768, 12, 1024), 1024, 64, CAUSAL),
    "gpt_350m": run(gpt(24, 1024, 16, 2048), 2048, 16, CAUSAL),
    "gpt_760m": run(gpt(24, 1536, 16, 2048), 2048, 8, CAUSAL),
    "gpt_1.3b": run(gpt(24, 2048, 16, 2048), 2048, 8, CAUSAL),
    "moe_350m": run(gpt(24, 1024, 16, 2048, experts=8), 2048, 8, CAUSAL),
    "modernbert": run(MODERNBERT, 1024, 64, MlmConfig(rate=0.3)),
    "wide_8b": run(WIDE, 8192, 2, CAUSAL),
}


def random_rows(run: Run) -> np.ndarray:
    """One document a row, of uniformly drawn tokens: int32 [A, B, T + 1]."""
    A = run.train.accumulation
    shape = (A, run.train.batch_rows // A, run.data.seq_len + 1)
    rows_ABU = np.random.default_rng(0).integers(len(SPECIAL_PIECES), run.model.vocab_size, shape, dtype=np.int32)
    rows_ABU[..., 0] = BOS_ID
    return rows_ABU
