"""A causal language model so small that tests and checks run it.

    llm-jax train configs/tiny_causal.py

Expect a loss that starts at about ln(1024) = 6.93, an even guess among the pieces, and falls from print to print, and
held-out rows close behind: a few hundred updates learn what Python looks like, not what it means (2.49 bits per byte of
test text).
Heads are divisible by 4, widths, positions and rows by 8: it runs on 8 devices, tensor=8 excepted.
"""

from llm_jax.data.config import DataConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import ModelConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, TrainConfig


def config() -> Run:
    return Run(
        name="tiny_causal",
        run_dir="runs/tiny_causal",
        model=ModelConfig(d_model=64, d_ff=176, n_layers=2, n_heads=4, n_kv_heads=4, d_head=16, vocab_size=1024),
        data=DataConfig(seq_len=128),
        optim=AdamWConfig(lr=3e-3, warmup_steps=20),
        train=TrainConfig(steps=200, batch_rows=16),
        checkpoint=CheckpointConfig(every=50),
        eval=EvalConfig(every=100, rows=64),
    )
