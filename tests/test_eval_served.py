"""Process 0 asks and all answer: the model's own likelihoods and texts, and no process is left waiting."""

import itertools
import json

import jax
import numpy as np
import pytest

from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import BOS_ID, TokenizerConfig
from llm_jax.eval.generate import Prompt
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.requests import pair_of
from llm_jax.eval.sampling import Sampling
from llm_jax.eval.scorer import make_score
from llm_jax.eval.served import Asker, Model, first_alone, served
from llm_jax.eval.tasks import likelihoods_of
from llm_jax.exit_codes import Failure
from tests.bigram import config_of, drawn_table, log_softmax, weights_for
from tests.conftest import LaunchProcesses
from tests.small import mesh_of, put_weights

CFG = config_of(300)
TEXT = "the cat sat on the mat.\nthe dog ran to the cat.\n"
GREEDY = Sampling(max_tokens=12, temperature=0.0)
DRAWN = Sampling(max_tokens=8, temperature=1.0)


def tokenizer_of():
    return tokenizers.train([TEXT * 30], TokenizerConfig(), 300)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of()


def asked(tokenizer, program, *, params=None, stop=lambda: False, batch_rows=8, **sizes):
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        weights = (put_weights(weights_for(drawn_table(300)) if params is None else params, CFG, mesh), {})
        likelihoods = likelihoods_of(make_score(CFG), weights, 64, batch_rows, stop)
        return served(Model(CFG, weights, tokenizer, likelihoods, 64, batch_rows, stop), program)


def chain(start: int, n: int) -> list[int]:
    """What the table's model writes greedily after an id."""
    ids = [start]
    for _ in range(n):
        ids.append(int(drawn_table(300)[ids[-1]].argmax()))
    return ids[1:]


def prompts_of(tokenizer) -> list[Prompt]:
    return [Prompt([BOS_ID, *tokenizer.encode(text)], n) for n, text in enumerate(("the", "", "the cat sat", "do"))]


def all_kinds(tokenizer):
    """A program that asks for everything there is."""

    def program(asker: Asker):
        pairs = [pair_of(tokenizer, "the cat", " sat"), pair_of(tokenizer, "", "mat"), pair_of(tokenizer, "", "")]
        texts = asker.texts(prompts_of(tokenizer), GREEDY, [])
        drawn = asker.texts(prompts_of(tokenizer), DRAWN, [])
        return asker.likelihoods(pairs), texts, drawn

    return program


def test_answers_are_the_models_own_in_the_order_of_the_questions(tokenizer):
    likelihoods, texts, drawn = asked(tokenizer, all_kinds(tokenizer), batch_rows=2)
    nats = log_softmax(drawn_table(300))
    ids = [BOS_ID, *tokenizer.encode("mat")]
    assert likelihoods[1].log_likelihood == pytest.approx(sum(nats[a, b] for a, b in itertools.pairwise(ids)))
    assert likelihoods[2] == (0.0, True, 0)
    assert texts == [tokenizer.decode(chain(prompt.ids[-1], 12)) for prompt in prompts_of(tokenizer)]
    assert drawn != texts


@pytest.mark.slow
def test_what_is_drawn_is_the_same_in_another_batch(tokenizer):
    two, four = (
        asked(tokenizer, lambda asker: asker.texts(prompts_of(tokenizer), DRAWN, []), batch_rows=n) for n in (2, 8)
    )
    assert two == four


def test_a_text_ends_before_its_stop_string(tokenizer):
    first, second = (tokenizer.decode(chain(prompt.ids[-1], 12)) for prompt in prompts_of(tokenizer)[:2])
    stop = first[3:6]
    assert asked(tokenizer, lambda asker: asker.texts(prompts_of(tokenizer)[:2], GREEDY, [stop]), batch_rows=2) == [
        first[: first.index(stop)],
        second.partition(stop)[0],
    ]


def test_scores_that_are_no_numbers_are_an_error_in_texts_too(tokenizer):
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), weights_for(drawn_table(300)))
    for ask in (
        lambda asker: asker.texts(prompts_of(tokenizer)[:2], GREEDY, []),
        lambda asker: asker.likelihoods([pair_of(tokenizer, "the", " cat")]),
    ):
        with pytest.raises(NotFinite):
            asked(tokenizer, ask, params=broken, batch_rows=2)


def test_a_signal_ends_the_program(tokenizer):
    ended = []

    def program(asker: Asker):
        asker.likelihoods([pair_of(tokenizer, "the", " cat")])
        ended.append(True)

    assert asked(tokenizer, program, stop=lambda: True) is None
    assert not ended
    assert asked(tokenizer, lambda asker: asker.texts([Prompt([BOS_ID], 0)], GREEDY, []), stop=lambda: True) is None


class Foreseen(Failure):
    exit_code = 65


def fails(asker: Asker):
    asker.likelihoods([pair_of(tokenizer_of(), "the", " cat")])
    raise Foreseen("the task is broken")


def test_what_the_program_raises_is_raised(tokenizer):
    with pytest.raises(Foreseen, match="the task is broken"):
        asked(tokenizer, fails)


def test_what_process_0_makes_alone_is_its_own():
    assert first_alone(lambda: 3) == 3
    with pytest.raises(Foreseen, match="the task is broken"):
        first_alone(broken)


def broken():
    raise Foreseen("the task is broken")


PROGRAM = """
import json, os
import tests.conftest
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
from llm_jax.distributed import join_processes
join_processes(100, 100)
import tests.test_eval_served as here
from llm_jax.eval import served
served.PART = 100  # so that every question comes in parts
for name in ("everything", "failing", "not_finite", "stopping", "alone", "everything"):
    try:
        print("said", json.dumps(getattr(here, name)()))
    except Exception as error:
        print("said", json.dumps(f"{type(error).__name__} {error.exit_code}: {error}"))
"""


def everything():
    tokenizer = tokenizer_of()
    return asked(tokenizer, all_kinds(tokenizer), fsdp=2, data=2)


def failing():
    return asked(tokenizer_of(), fails, fsdp=2, data=2)


def not_finite():
    # Infinities make NaN, and are equal on both processes, which JAX makes sure of.
    broken = jax.tree.map(lambda x: np.full_like(x, np.inf), weights_for(drawn_table(300)))
    return asked(tokenizer_of(), fails, params=broken, fsdp=2, data=2)


def stopping():
    # Both are asked in the same places, and both say so.
    return asked(tokenizer_of(), fails, stop=lambda: True, fsdp=2, data=2)


def alone():
    with pytest.raises(Failure, match="the task is broken") as caught:
        first_alone(broken)
    return caught.value.exit_code, first_alone(lambda: 3)


@pytest.mark.slow
def test_two_processes_answer_as_one_and_go_on_together_whatever_happens(launch_processes: LaunchProcesses, tokenizer):
    first, second = (
        [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("said ")]
        for done in launch_processes(2, 2, ["-c", PROGRAM])
    )
    broken = "1 of 1 requests have a score that is not a number: the weights are broken"
    assert first[1:5] == ["Foreseen 65: the task is broken", f"NotFinite 70: {broken}", None, [65, 3]]
    assert second == [None, "Failure 65: the task is broken", f"NotFinite 70: {broken}", None, [65, None], None]
    likelihoods, *texts = first[0]
    ours, *our_texts = asked(tokenizer, all_kinds(tokenizer))
    assert texts == our_texts and first[5] == first[0]
    assert [nats for nats, _, _ in likelihoods] == pytest.approx([answer.log_likelihood for answer in ours])
