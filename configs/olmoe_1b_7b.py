"""OLMoE-1B-7B (Muennighoff et al. 2024): 64 small experts in every layer, of which a token chooses 8.

    llm-jax train configs/olmoe_1b_7b.py

6,919,161,856 parameters, as published, 1,282,017,280 of them for each token; the vocabulary needs no padding.
Put your own texts below texts/, or say data.source.paths=...

Mesh: fsdp 16, data over the rest, written for 256 devices (data 16) of 80 GB: 4 rows on each at a time. All experts of
a layer are gathered on a device: they are small, and with mesh.expert buffers need room for the worst routing.
The paper's: the architecture, batch, peak learning rate, both losses' coefficients and 5.1 trillion tokens; the 2000
updates of warm-up and the decay to 10% are those of the configurations published with its code. Not the paper's: its
optimizer decays norms too, and a last 100 billion tokens anneal the learning rate to 0.
Expect a loss from ln(50304) = 10.8 down, and load_max_over_mean near 1 after the first thousand updates.
"""

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, MeshConfig, TrainConfig


def config() -> Run:
    return Run(
        name="olmoe_1b_7b",
        run_dir="runs/olmoe_1b_7b",
        model=ModelConfig(
            d_model=2048,
            d_ff=1024,
            n_layers=16,
            n_heads=16,
            n_kv_heads=16,
            d_head=128,
            vocab_size=50_304,
            period=(LayerConfig(moe=True),),
            moe=MoeConfig(experts=64, top_k=8, d_ff=1024, normalise_gates=False, load_balance=0.01, router_z=0.001),
            qk_norm=True,
            qk_norm_over="all",
            norm_eps=1e-5,
            compute_dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(source=FilesSource(paths=("texts",)), seq_len=4096, validation_share=0.001, test_share=0.001),
        tokenizer=TokenizerConfig(train_bytes=500_000_000),
        optim=AdamWConfig(lr=4e-4, b2=0.95, weight_decay=0.1, warmup_steps=2000, final_lr_share=0.1),
        mesh=MeshConfig(data=-1, fsdp=16),
        train=TrainConfig(steps=1_223_842, batch_rows=1024),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, rows=1024, batch_rows=256),
    )
