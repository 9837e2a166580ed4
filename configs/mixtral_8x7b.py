"""Mixtral 8x7B (Jiang et al. 2024): Mistral 7B with 8 experts in every layer, of which a token chooses 2.

    llm-jax train configs/mixtral_8x7b.py

46,702,792,704 parameters, as published, 12,879,925,248 of them for each token; the vocabulary needs no padding.
Put your own texts below texts/, or say data.source.paths=...

Mesh: expert 8 x fsdp 8, for 64 devices of 80 GB, or data times as many: each has one expert of every layer.
The architecture and the load-balance coefficient are those of the published weights' configuration. How Mixtral was
trained is not published: batch, learning rate and the 1 trillion tokens are choices, and so are rows of 8192 tokens
(Mixtral reads 32768: data.seq_len=32768 train.batch_rows=128 train.accumulation=2 model.attention=chunked).
Expect a loss from ln(32000) = 10.4 down, and load_max_over_mean near 1 after the first thousand updates.
"""

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, MeshConfig, TrainConfig


def config() -> Run:
    return Run(
        name="mixtral_8x7b",
        run_dir="runs/mixtral_8x7b",
        model=ModelConfig(
            d_model=4096,
            d_ff=14_336,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            d_head=128,
            vocab_size=32_000,
            period=(LayerConfig(moe=True),),
            moe=MoeConfig(experts=8, top_k=2, d_ff=14_336, load_balance=0.02, router_z=0.0),
            rope_theta=1_000_000.0,
            norm_eps=1e-5,
            compute_dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(source=FilesSource(paths=("texts",)), seq_len=8192, validation_share=0.001, test_share=0.001),
        tokenizer=TokenizerConfig(train_bytes=500_000_000),
        optim=AdamWConfig(lr=3e-4, b2=0.95, weight_decay=0.1, warmup_steps=2000, final_lr_share=0.1),
        mesh=MeshConfig(data=-1, fsdp=8, expert=8),
        train=TrainConfig(steps=238_000, batch_rows=512, accumulation=8),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, rows=512, batch_rows=64),
    )
