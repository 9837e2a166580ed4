"""DeepSeek-V3's layers of experts (DeepSeek-AI 2024) around plain grouped-query attention.

    llm-jax train configs/deepseek_v3_experts.py

674,836,083,712 parameters, 41,361,961,984 of them for each token; the vocabulary needs no padding. DeepSeek-V3 has
671 billion and 37 billion: 653,908,770,816 (97%) are the routed experts, exactly these, and the rest differs by the
attention, which is latent there, and by what is left out: multi-token prediction, and the limit on how many nodes a
token's experts may be spread over.
Put your own texts below texts/, or say data.source.paths=...

Mesh: expert 16 x fsdp 32 x context 2, for 1024 devices of 95 GB (TPU v5p:8x8x16): each has 16 experts of every layer,
and half a row at a time.
The paper's: experts, their choice by sigmoid scores with a bias in place of a large loss, batch, peak learning rate and
14.8 trillion tokens. Its learning rate falls along a cosine over the last 4.8 trillion, here in a line; its batch grows
from 3072 rows.
Expect a loss from ln(129280) = 11.8 down, and load_max_over_mean to fall as the biases move by 0.001 an update.
"""

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, MeshConfig, TrainConfig


def config() -> Run:
    return Run(
        name="deepseek_v3_experts",
        run_dir="runs/deepseek_v3_experts",
        model=ModelConfig(
            d_model=7168,
            d_ff=18_432,
            n_layers=61,
            n_heads=128,
            n_kv_heads=8,
            d_head=128,
            vocab_size=129_280,
            leading=(LayerConfig(), LayerConfig(), LayerConfig()),
            period=(LayerConfig(moe=True),),
            moe=MoeConfig(
                experts=256,
                top_k=8,
                d_ff=2048,
                shared_d_ff=2048,
                scores="sigmoid",
                normalise_gates=True,
                gate_scale=2.5,
                load_balance=1e-4,
                router_z=0.0,
                balance_rate=0.001,
            ),
            compute_dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(source=FilesSource(paths=("texts",)), seq_len=4096, validation_share=0.001, test_share=0.001),
        tokenizer=TokenizerConfig(train_bytes=2_000_000_000),
        optim=AdamWConfig(lr=2.2e-4, b2=0.95, weight_decay=0.1, schedule="wsd", warmup_steps=2000, decay_steps=76_000),
        mesh=MeshConfig(data=-1, fsdp=32, context=2, expert=16),
        train=TrainConfig(steps=235_000, batch_rows=15_360, accumulation=30),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=1000, rows=1024, batch_rows=1024),
    )
