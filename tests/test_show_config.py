"""What `llm-jax config` makes of sections that are null, of lists of sections, and what it works out."""

from pathlib import Path

import pytest

from llm_jax.config import describe
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig, YarnScaling
from llm_jax.objective.config import MlmConfig
from llm_jax.run import Run, from_command_line
from llm_jax.show_config import summary, table

ROOT = Path(__file__).parents[1]
MOE = ModelConfig(n_layers=2, period=(LayerConfig(), LayerConfig(window=64, moe=True)), moe=MoeConfig(experts=4))


def line(shown: str, path: str) -> str:
    """The line of one field, a blank for many."""
    (found,) = [line for line in shown.splitlines() if line[1:].split()[:1] == [path]]
    return " ".join(found.split())


def test_a_section_that_is_null_is_shown_as_a_field_of_its_own() -> None:
    shown = table(Run())
    assert line(shown, "model.moe") == (
        "model.moe null a section or null The mixture of experts of the layers that have one."
    )
    assert line(shown, "model.rope_scaling").startswith("model.rope_scaling null a section or null How rotary")
    assert "model.moe:" not in shown
    # Every heading has fields below it.
    blocks = shown.split("\n\n")
    assert all(len(block.splitlines()) > 1 for block in blocks)


def test_a_section_that_could_be_null_is_compared_with_its_classs_defaults() -> None:
    shown = table(Run(model=MOE.model_copy(update={"rope_scaling": YarnScaling(factor=2, original_length=64)})))
    assert "model.moe: The mixture of experts of the layers that have one." in shown.splitlines()
    assert line(shown, "model.moe.experts").startswith("* model.moe.experts 4 a whole number at least 2; default 8")
    assert line(shown, "model.moe.top_k").startswith("model.moe.top_k 2 a whole number at least 1 Experts")
    assert line(shown, "model.rope_scaling.slow").startswith("model.rope_scaling.slow 1.0 a number more than 0 Pairs")
    assert line(shown, "model.rope_scaling.name").startswith("* model.rope_scaling.name yarn")


def test_layers_are_shown_by_what_they_have_of_their_own() -> None:
    shown = table(Run(model=MOE))
    assert line(shown, "model.period").startswith(
        '* model.period [{}, {"window": 64, "moe": true}] a list of LayerConfig with at least 1 item; default [{}] The'
    )
    assert line(shown, "model.leading").startswith("model.leading [] a list of LayerConfig The first")
    assert line(table(Run()), "model.period").startswith("model.period [{}] a list of LayerConfig with")
    # A list that is written out in full is no other list.
    full = ModelConfig(period=(LayerConfig(window=None, moe=False),))
    assert not any(row.changed for row in describe(full))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "gpt2_124m",
            "124,439,808 parameters; 124,475,904 with the padded vocabulary; 8.55e+08 FLOPs to train on a token",
        ),
        ("mixtral_8x7b", "46,702,792,704 parameters; 12,879,925,248 of them for a token; 8.94e+10 FLOPs"),
        ("llama3_8b", "8,030,261,248 parameters; 5.79e+10 FLOPs to train on a token (6N active + attention to the row"),
    ],
)
def test_the_last_line_tells_the_size(name: str, told: str) -> None:
    assert summary(from_command_line(ROOT / f"configs/{name}.py", [])).startswith(told)


def test_the_size_follows_the_objective() -> None:
    assert summary(Run(objective=MlmConfig())) != summary(Run())
