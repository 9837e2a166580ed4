"""lm-evaluation-harness on models that have no opinion, and on weights that are no numbers."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.run import Run
from tests.bigram import drawn_table, weights_for
from tests.conftest import Start
from tests.test_eval_lm_harness import CFG, CHOICES, ROLLED, TEXT, Made, save, task_files

V = CFG.vocab_size


def made_of(root: Path, table: np.ndarray, *, broken: bool = False) -> Made:
    """A run directory with these weights, and the tasks."""
    tokenizer = tokenizers.train([TEXT * 30], TokenizerConfig(), V)
    made = Made(root / "run", root / "tasks", tokenizer, table)
    params = weights_for(table)
    if broken:
        params = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    save(
        made.run_dir,
        Run(name="made", run_dir=str(made.run_dir), model=CFG, data=DataConfig(seq_len=64)),
        tokenizer,
        params,
    )
    # Texts that a model would write: of another one, since nothing can be read of these.
    task_files(made.tasks, made._replace(table=drawn_table(V)))
    return made


@pytest.mark.slow
def test_a_constant_model_pays_log_v_a_token_and_its_first_guess_is_the_lowest_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from llm_jax.eval.lm_harness import evaluate_with_lm_eval

    made = made_of(tmp_path, np.zeros((V, V), np.float32))
    answered = [path for path in made.paths if "written" not in path]
    result = evaluate_with_lm_eval(str(made.run_dir), None, [], answered, as_json=True)
    assert result is not None
    told = result["lm_eval"]["tasks"]

    def n_tokens(context: str, continuation: str) -> int:
        return len(made.steps(context, continuation))

    continued = [json.loads(line) for line in (made.tasks / "continued.jsonl").read_text().splitlines()]
    asked = [n_tokens(document["text"], document["target"]) for document in continued]
    assert told["continued"]["perplexity"] == pytest.approx(math.exp(np.mean(asked) * math.log(V)), rel=1e-5)
    # The lowest id is padding, which no text has.
    assert told["continued"]["acc"] == 0 and min(asked) > 0
    n_bytes = sum(len(document["text"].encode()) for document in ROLLED)
    bits = sum(n_tokens("", document["text"]) for document in ROLLED) * math.log2(V)
    assert told["rolled"]["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-5)
    # Fewer tokens are likelier, and of equals the harness takes the first.
    best = [
        int(np.argmin([n_tokens(d["question"].rstrip(), " " * d["question"].endswith(" ") + c) for c in d["choices"]]))
        for d in CHOICES
    ]
    right = [choice == document["answer"] for choice, document in zip(best, CHOICES, strict=True)]
    assert told["choice"]["acc"] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_weights_that_are_no_numbers_end_the_harness_in_one_line(tmp_path: Path, start: Start) -> None:
    made = made_of(tmp_path, drawn_table(V), broken=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = start("-m", "llm_jax", "eval", str(made.run_dir), "--lm-eval", *made.paths, env=offline).wait()
    assert done.returncode == 70, done.stderr
    assert done.stderr.splitlines()[-1].endswith("have a score that is not a number: the weights are broken")
    assert "Traceback" not in done.stderr and not (made.run_dir / "eval.jsonl").exists()
