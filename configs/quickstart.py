"""The newcomer's run: a small language model of Python source, from the text of this machine's standard library.

    python3 dev.py quickstart                  everything: install, prepare, train, evaluate, report
    llm-jax train configs/quickstart.py        the training alone; again to go on where it stopped

Expect fewer bits per byte on held-out modules than zlib -9 needs for them, and samples whose indentation and brackets
look right while their names are invented.
"""

from llm_jax.data.config import DataConfig
from llm_jax.eval.config import EvalConfig
from llm_jax.model.config import ModelConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.config import CheckpointConfig, TrainConfig


def config() -> Run:
    return Run(
        name="quickstart",
        run_dir="runs/quickstart",
        model=ModelConfig(d_model=128, d_ff=352, n_layers=4, n_heads=4, n_kv_heads=4, d_head=32, vocab_size=2048),
        data=DataConfig(seq_len=256),
        optim=AdamWConfig(lr=4e-3, warmup_steps=20, schedule="linear", final_lr_share=0.05),
        train=TrainConfig(steps=300, batch_rows=16),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=100, rows=256),
    )
