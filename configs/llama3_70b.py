"""Llama 3 70B (Llama Team 2024, "The Llama 3 herd of models").

    llm-jax train configs/llama3_70b.py

70,553,706,496 parameters, as published; the vocabulary needs no padding.
Put your own texts below texts/, or say data.source.paths=...

Mesh: fsdp 32 x tensor 4, for 128 devices of 80 GB or more (16 nodes of 8 GPUs, or TPU v5p:4x4x8), one row at a time on
each four; for data 2, 256 devices, add train.accumulation=16 eval.batch_rows=64.
The paper's: the peak learning rate (its table 3), 8192 tokens a row and 15 trillion in all. It gives the warm-up, the
decay to 1% and batches for 405B alone: the 8 million tokens here are those of that model's second phase.
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
        name="llama3_70b",
        run_dir="runs/llama3_70b",
        model=ModelConfig(
            d_model=8192,
            d_ff=28_672,
            n_layers=80,
            n_heads=64,
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
        optim=AdamWConfig(lr=1.5e-4, b2=0.95, weight_decay=0.1, warmup_steps=8000, final_lr_share=0.01),
        mesh=MeshConfig(data=-1, fsdp=32, tensor=4),
        train=TrainConfig(steps=1_788_000, batch_rows=1024, accumulation=32),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=1000, rows=256, batch_rows=32),
    )
