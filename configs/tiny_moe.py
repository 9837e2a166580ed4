"""A causal language model with experts, so small that tests and checks run it.

    llm-jax train configs/tiny_moe.py
    llm-jax eval runs/tiny_moe

A dense layer first, then layers of 8 experts of which a token passes 2, kept in balance by a loss. Watch `load` in the
printed lines: the load of the fullest expert of any layer as a multiple of an even share; it falls from 1.8 to 1.5.
Expect 2.42 bits per byte of test text (the dense tiny_causal: 2.49).
"""

from llm_jax.data.config import DataConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, TrainConfig


def config() -> Run:
    return Run(
        name="tiny_moe",
        run_dir="runs/tiny_moe",
        model=ModelConfig(
            d_model=64,
            d_ff=176,
            n_layers=3,
            n_heads=4,
            n_kv_heads=4,
            d_head=16,
            vocab_size=1024,
            leading=(LayerConfig(),),
            period=(LayerConfig(moe=True),),
            moe=MoeConfig(experts=8, top_k=2, d_ff=88),
        ),
        data=DataConfig(seq_len=128),
        optim=AdamWConfig(lr=3e-3, warmup_steps=20),
        train=TrainConfig(steps=200, batch_rows=16),
        checkpoint=CheckpointConfig(every=50),
        eval=EvalConfig(every=100, rows=64),
    )
