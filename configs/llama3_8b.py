"""Llama 3 8B (Llama Team 2024, "The Llama 3 herd of models").

    llm-jax train configs/llama3_8b.py

8,030,261,248 parameters, as published; the vocabulary needs no padding.
Put your own texts below texts/, or say data.source.paths=...

Mesh: fsdp over the 8 devices of a node and data over the nodes, written for 128 devices (data 16) of 80 GB, one row on
each at a time; on one node of 8 add train.accumulation=64 eval.batch_rows=8.
The paper's: the peak learning rate (its table 3), 8192 tokens a row and 15 trillion in all. It gives the warm-up and
the decay to 1% for 405B alone, taken over here, and no batch for 8B: 4 million tokens are what 405B began with.
Expect a loss from ln(128256) = 11.8 down, most of the way within the first thousand updates.
"""

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import ModelConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, MeshConfig, TrainConfig


def config() -> Run:
    return Run(
        name="llama3_8b",
        run_dir="runs/llama3_8b",
        model=ModelConfig(
            d_model=4096,
            d_ff=14_336,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            d_head=128,
            vocab_size=128_256,
            rope_theta=500_000.0,
            norm_eps=1e-5,
            compute_dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(source=FilesSource(paths=("texts",)), seq_len=8192, validation_share=0.001, test_share=0.001),
        tokenizer=TokenizerConfig(train_bytes=2_000_000_000),
        optim=AdamWConfig(lr=3e-4, b2=0.95, weight_decay=0.1, warmup_steps=8000, final_lr_share=0.01),
        mesh=MeshConfig(data=-1, fsdp=8),
        train=TrainConfig(steps=3_576_000, batch_rows=512, accumulation=4),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, rows=512, batch_rows=128),
    )
