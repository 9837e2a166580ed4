"""GPT-2's smallest model, 124M (Radford et al. 2019), with the training settings of GPT-3's model of that size.

    llm-jax train configs/gpt2_124m.py

124,439,808 parameters, as published; 124,475,904 with the vocabulary's rows padded to a multiple of 128.
Put your own texts (English web text for what GPT-2 is) below texts/, or say data.source.paths=...

Mesh: data alone, for 8 devices or any number that divides 128 rows; every device holds the whole model.
Batch, learning rate, warm-up, decay and 300 billion tokens are GPT-3's for 125M (Brown et al. 2020, table 2.1), since
GPT-2's were not published. Not GPT-2's: the tokenizer, a sentencepiece BPE of the same size; no dropout.
Expect a loss from ln(50257) = 10.8 down to about 3 nats a token on web text.
"""

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import ModelConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, MeshConfig, TrainConfig


def config() -> Run:
    return Run(
        name="gpt2_124m",
        run_dir="runs/gpt2_124m",
        model=ModelConfig(
            d_model=768,
            d_ff=3072,
            n_layers=12,
            n_heads=12,
            n_kv_heads=12,
            d_head=64,
            vocab_size=50_257,
            mlp="gelu_tanh",
            bias="all",
            tied_embeddings=True,
            learned_positions=1024,
            norm="layernorm",
            norm_bias=True,
            norm_eps=1e-5,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(source=FilesSource(paths=("texts",)), seq_len=1024, validation_share=0.005, test_share=0.005),
        tokenizer=TokenizerConfig(train_bytes=500_000_000),
        optim=AdamWConfig(lr=6e-4, b2=0.95, weight_decay=0.1, warmup_steps=715, final_lr_share=0.1),
        mesh=MeshConfig(data=-1),
        train=TrainConfig(steps=572_000, batch_rows=512, accumulation=4),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, rows=1024, batch_rows=128),
    )
