"""The newcomer's run: a small language model of Python source, from the text of this machine's standard library.

    python3 dev.py quickstart                  everything: install, prepare, train, evaluate, report
    llm-jax train configs/quickstart.py        the training alone; again to go on where it stopped

Expect a loss that falls steeply for the first hundred updates and slowly after that, no gap to speak of between
training and held-out text, and samples whose indentation and brackets look right while their names are invented.
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
        model=ModelConfig(d_model=192, d_ff=512, n_layers=4, n_heads=4, n_kv_heads=4, d_head=48, vocab_size=4096),
        data=DataConfig(seq_len=256),
        optim=AdamWConfig(lr=3e-3, warmup_steps=50),
        train=TrainConfig(steps=600, batch_rows=16),
        checkpoint=CheckpointConfig(every=200),
        eval=EvalConfig(every=200, rows=128),
    )
