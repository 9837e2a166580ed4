"""A causal language model with local and global attention in turn, so small that tests and checks run it.

    llm-jax train configs/tiny_local_global.py
    llm-jax eval runs/tiny_local_global

Every third layer looks at its whole document, the others at the last 32 positions, with a rotary base of their own:
four layers are one period of three, which the scan runs through, and a remainder of one. Expect 2.39 bits per byte of
test text.
"""

from llm_jax.data.config import DataConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, TrainConfig

LOCAL = LayerConfig(window=32, rope_theta=1000.0)


def config() -> Run:
    return Run(
        name="tiny_local_global",
        run_dir="runs/tiny_local_global",
        model=ModelConfig(
            d_model=64,
            d_ff=176,
            n_layers=4,
            n_heads=4,
            n_kv_heads=4,
            d_head=16,
            vocab_size=1024,
            period=(LayerConfig(), LOCAL, LOCAL),
        ),
        data=DataConfig(seq_len=128),
        optim=AdamWConfig(lr=3e-3, warmup_steps=20),
        train=TrainConfig(steps=200, batch_rows=16),
        checkpoint=CheckpointConfig(every=50),
        eval=EvalConfig(every=100, rows=64),
    )
