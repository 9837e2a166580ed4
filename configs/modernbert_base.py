"""ModernBERT-base (Warner et al. 2024): local and global layers, rotary positions, 30% of the tokens predicted.

    llm-jax train configs/modernbert_base.py

149,655,232 parameters, those of the published masked-language model (its output bias is one of the few biases there
are); 149,704,448 with the vocabulary's rows padded to a multiple of 128.
Put your own texts below texts/, or say data.source.paths=...

Mesh: data alone, for 8 devices or any number that divides 128 rows; every device holds the whole model.
The published settings of the first 1.7 trillion tokens: batch, learning rate, warm-up, weight decay, 1024 tokens a row
(the decay there is a share of the weight, here of weight times learning rate: 1e-5 / 8e-4). Not published so: AdamW for
StableAdamW; a batch that is full from the start; a last decay over 50 billion tokens, which comes there after the rows
have grown to 8192; the global layers' theta of that time from the start, where it was 10000 so far.
Expect a loss from ln(50368) = 10.8 that, as with other BERTs, stands near 7 for a while before it falls below 2.
"""

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.objective.config import MlmConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, MeshConfig, TrainConfig

LOCAL = LayerConfig(window=128, rope_theta=10_000.0)


def config() -> Run:
    return Run(
        name="modernbert_base",
        run_dir="runs/modernbert_base",
        model=ModelConfig(
            d_model=768,
            d_ff=1152,
            n_layers=22,
            n_heads=12,
            n_kv_heads=12,
            d_head=64,
            vocab_size=50_368,
            # Layers 0, 3, 6, ... 21 are global; before the first there is the embeddings' norm already.
            leading=(LayerConfig(attention_norm=False),),
            period=(LOCAL, LOCAL, LayerConfig()),
            mlp="geglu",
            tied_embeddings=True,
            embedding_norm=True,
            head_transform=True,
            output_bias=True,
            rope_theta=160_000.0,
            norm="layernorm",
            norm_eps=1e-5,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(source=FilesSource(paths=("texts",)), seq_len=1024, validation_share=0.001, test_share=0.001),
        tokenizer=TokenizerConfig(train_bytes=500_000_000),
        objective=MlmConfig(rate=0.3),
        optim=AdamWConfig(
            lr=8e-4,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.0125,
            schedule="wsd",
            warmup_steps=636,
            decay_steps=10_600,
            final_lr_share=0.0,
        ),
        mesh=MeshConfig(data=-1),
        train=TrainConfig(steps=364_000, batch_rows=4608, accumulation=36),
        checkpoint=CheckpointConfig(every=2000),
        eval=EvalConfig(every=2000, rows=1024, batch_rows=128),
    )
