"""BERT-base, uncased (Devlin et al. 2018): masked-language modelling with 15% of the tokens predicted.

    llm-jax train configs/bert_base.py

109,514,298 parameters, as published for the masked-language model without its pooler; 109,568,128 with the vocabulary's
rows padded to a multiple of 128.
Put your own texts (the paper's are books and the English Wikipedia) below texts/, or say data.source.paths=...

Mesh: data alone, for 8 devices or any number that divides 256 rows; every device holds the whole model.
The paper's: architecture, masking, batch, learning rate and schedule, 1 million updates. Not the paper's: the
tokenizer, a sentencepiece BPE of the same size that keeps upper case; no next-sentence prediction, so all tokens have
the first token type; no dropout; rows of 512 from the start, where the paper has 128 for the first 90% of updates.
Expect a loss from ln(30522) = 10.3 that, as with other BERTs, stands near 7 for a while before it falls below 2.
"""

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import ModelConfig
from llm_jax.objective.config import MlmConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, MeshConfig, TrainConfig


def config() -> Run:
    return Run(
        name="bert_base",
        run_dir="runs/bert_base",
        model=ModelConfig(
            d_model=768,
            d_ff=3072,
            n_layers=12,
            n_heads=12,
            n_kv_heads=12,
            d_head=64,
            vocab_size=30_522,
            mlp="gelu",
            bias="all",
            tied_embeddings=True,
            embedding_norm=True,
            token_types=2,
            head_transform=True,
            output_bias=True,
            learned_positions=512,
            norm="layernorm",
            norm_bias=True,
            norm_place="post",
            norm_eps=1e-12,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(source=FilesSource(paths=("texts",)), seq_len=512, validation_share=0.005, test_share=0.005),
        tokenizer=TokenizerConfig(train_bytes=500_000_000),
        objective=MlmConfig(rate=0.15),
        optim=AdamWConfig(
            lr=1e-4,
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
            schedule="linear",
            warmup_steps=10_000,
            final_lr_share=0.0,
        ),
        mesh=MeshConfig(data=-1),
        train=TrainConfig(steps=1_000_000, batch_rows=256),
        checkpoint=CheckpointConfig(every=5000),
        eval=EvalConfig(every=5000, rows=1024, batch_rows=256),
    )
