"""lm-evaluation-harness on a bigram model: its figures are those that the table gives, in one process and in two."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import Checkpoints
from llm_jax.config import ConfigError, tree
from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import BOS_ID, MASK_ID, DataConfig, TokenizerConfig
from llm_jax.data.errors import DataError
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.perplexity import NotFinite
from llm_jax.eval.sampling import Sampling
from llm_jax.model.paths import to_tree
from llm_jax.objective.config import MlmConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.run_directory import Refused
from llm_jax.train.state import init_state
from tests.bigram import config_of, drawn_table, log_softmax, weights_for
from tests.conftest import ROOT, LaunchProcesses, Start
from tests.small import mesh_of, put_weights

CFG = config_of(300)
TEXT = "the cat sat on the mat.\nthe dog ran to the cat.\n"

CHOICES = [
    {"question": "the cat", "choices": [" sat", " ran", " on the mat"], "answer": 0},
    {"question": "the dog ", "choices": ["ran", "sat", "cat"], "answer": 2},
    {"question": "", "choices": ["the", "cat"], "answer": 1},
    {"question": "on", "choices": [" the mat.", " \u6f22"], "answer": 0},
    {"question": "to the", "choices": [" dog", " cat"], "answer": 1},
]
ROLLED = [{"text": TEXT * 9}, {"text": "the cat \u00e9 sat"}, {"text": "x"}]


class Made(NamedTuple):
    """A run directory whose checkpoint is a bigram table, and the harness's four kinds of tasks on files of its own."""

    run_dir: Path
    tasks: Path
    tokenizer: Tokenizer
    table: np.ndarray

    @property
    def paths(self) -> list[str]:
        return sorted(map(str, self.tasks.glob("*.yaml")))

    def steps(self, context: str, continuation: str) -> list[tuple[int, int]]:
        """Each id that is asked for, after the one before it; no piece of these texts spans the border."""
        before = self.tokenizer.encode(context).tolist()
        ids = [BOS_ID, *self.tokenizer.encode(context + continuation).tolist()]
        assert ids[1 : len(before) + 1] == before
        return list(itertools.pairwise(ids[len(before) :]))

    def nats(self, context: str, continuation: str) -> float:
        """The closed form."""
        return sum(log_softmax(self.table)[step] for step in self.steps(context, continuation))

    def is_greedy(self, context: str, continuation: str) -> bool:
        return all(self.table[a].argmax() == b for a, b in self.steps(context, continuation))

    def greedy(self, context: str, n: int) -> str:
        """What the model writes."""
        ids = [BOS_ID, *self.tokenizer.encode(context).tolist()][-1:]
        for _ in range(n):
            ids.append(int(self.table[ids[-1]].argmax()))
        return self.tokenizer.decode(ids[1:])


def task_files(folder: Path, made: Made) -> None:
    folder.mkdir()
    written = [made.greedy(context, 9) for context in ("the", "the cat", "on")]
    continued = [("the cat", written[1][:3]), ("the", " cat"), ("", "the"), ("the mat", ".\n")]
    until = written[2][2:5]
    kinds = {
        "choice": (CHOICES, "multiple_choice", ("question", "answer"), 'doc_to_choice: "{{choices}}"'),
        "continued": (
            [{"text": context, "target": target} for context, target in continued],
            "loglikelihood",
            ("text", "target"),
            "metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]",
        ),
        "rolled": (
            ROLLED,
            "loglikelihood_rolling",
            (None, "text"),
            "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
        ),
        "written": (
            [
                {"text": "the", "target": written[0].split(until)[0]},
                {"text": "the cat", "target": "no"},
                {"text": "on", "target": written[2].split(until)[0]},
            ],
            "generate_until",
            ("text", "target"),
            "metric_list: [{metric: exact_match}]\n"
            f"generation_kwargs: {{until: [{json.dumps(until)}], max_gen_toks: 9}}",
        ),
    }
    for name, (documents, kind, (text, target), more) in kinds.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {name}.jsonl}}}}\n"
            f"output_type: {kind}\nvalidation_split: validation\n"
            f'doc_to_text: "{"{{" + text + "}}" if text else ""}"\ndoc_to_target: "{{{{{target}}}}}"\n'
            f'target_delimiter: ""\n{more}\nmetadata: {{version: 1.0}}\n'
        )


def save(run_dir: Path, run: Run, tokenizer: Tokenizer, params) -> None:
    with jax.set_mesh(mesh_of(fsdp=8)):
        state = jax.jit(lambda: init_state(CFG, AdamWConfig(), 0))()
        state = dataclasses.replace(state, params=put_weights(params, CFG, mesh_of(fsdp=8)))
        meta = {"format": 1, "run": tree(run), "tokenizer": tokenizer.fingerprint, "data": "0", "versions": {}}
        with contextlib.closing(Checkpoints(run_dir / "checkpoints", keep=9)) as checkpoints:
            checkpoints.save(7, jax.jit(to_tree)(state), meta, wait=True)
    (run_dir / "tokenizer.model").write_bytes(tokenizer.model)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("made")
    tokenizer = tokenizers.train([TEXT * 30], TokenizerConfig(), 300)
    table = drawn_table(300).copy()
    # What it writes can be read.
    odd = [i for i, text in enumerate(tokenizer.piece_texts) if not (text.isalpha() and text.isascii())]
    table[:, odd] -= 20
    made = Made(root / "run", root / "tasks", tokenizer, table)
    run = Run(name="bigram", run_dir=str(made.run_dir), model=CFG, data=DataConfig(seq_len=64))
    save(made.run_dir, run, tokenizer, weights_for(table))
    task_files(made.tasks, made)
    return made


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Iterator[dict[str, str]]:
    """What keeps the harness off the network, read when it is first imported."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield env


def expected(made: Made) -> dict[str, dict[str, float]]:
    """The figures that the table gives."""
    best = [
        int(np.argmax([made.nats(d["question"].rstrip(), " " * d["question"].endswith(" ") + c) for c in d["choices"]]))
        for d in CHOICES
    ]
    right = [float(a == d["answer"]) for a, d in zip(best, CHOICES, strict=True)]
    continued = [json.loads(line) for line in (made.tasks / "continued.jsonl").read_text().splitlines()]
    nats = [made.nats(d["text"], d["target"]) for d in continued]
    greedy = [made.is_greedy(d["text"], d["target"]) for d in continued]
    assert 0 < sum(greedy) < 4
    rolled = sum(made.nats("", d["text"]) for d in ROLLED)
    n_bytes = sum(len(d["text"].encode()) for d in ROLLED)
    return {
        "choice": {"samples": 5, "acc": statistics.mean(right), "acc_stderr": statistics.stdev(right) / math.sqrt(5)},
        "continued": {"samples": 4, "perplexity": math.exp(-statistics.mean(nats)), "acc": sum(greedy) / 4},
        "rolled": {
            "samples": 3,
            "word_perplexity": math.exp(-rolled / sum(len(re.split(r"\s+", d["text"])) for d in ROLLED)),
            "byte_perplexity": math.exp(-rolled / n_bytes),
            "bits_per_byte": -rolled / n_bytes / math.log(2),
        },
        "written": {"samples": 3, "exact_match": 2 / 3},
    }


def assert_as_expected(tasks, made: Made) -> None:
    assert tasks.keys() == expected(made).keys()
    for task, figures in expected(made).items():
        assert {name: tasks[task][name] for name in figures} == pytest.approx(figures, rel=1e-5), task
    assert tasks["continued"]["perplexity_stderr"] > 0 and tasks["rolled"]["bits_per_byte_stderr"] is None


def json_lines(stdout: str) -> list[str]:
    # XLA's CPU collectives announce themselves on stdout too.
    return [line for line in stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_four_kinds_of_tasks_give_the_tables_figures_in_one_process_and_in_two(
    made: Made, offline, start: Start, launch_processes: LaunchProcesses
):
    arguments = ["-m", "llm_jax", "eval", str(made.run_dir), "--json", "--lm-eval", *made.paths]
    done = start(*arguments, env=offline).wait()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # and nothing else
    assert told["step"] == 7 and told["lm_eval"]["limit"] is None
    assert_as_expected(told["lm_eval"]["tasks"], made)
    *_, record = map(json.loads, (made.run_dir / "eval.jsonl").read_text().splitlines())
    assert record.pop("time").endswith("+00:00") and record == told
    first, second = launch_processes(2, 2, arguments, env=offline)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json_lines(second.stdout) == []
    (line,) = json_lines(first.stdout)
    assert_as_expected(json.loads(line)["lm_eval"]["tasks"], made)


@pytest.mark.slow
def test_a_failure_of_process_0_releases_the_others_with_its_exit_code(
    made: Made, offline, launch_processes: LaunchProcesses, tmp_path
):
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\n")
    arguments = ["-m", "llm_jax", "eval", str(made.run_dir), "--lm-eval", str(tmp_path / "broken.yaml")]
    both = launch_processes(2, 2, arguments, env=offline)
    for done in both:
        assert done.returncode == 65, done.stderr
        assert f"--lm-eval {tmp_path / 'broken.yaml'}: the task cannot be loaded: " in done.stderr
    assert "Traceback" not in both[1].stderr


class Askers:
    """What the adapter asks of."""

    def __init__(self, made: Made) -> None:
        from llm_jax.eval.scorer import make_score
        from llm_jax.eval.served import Model

        self.made = made
        self.mesh = mesh_of()
        with jax.set_mesh(self.mesh):
            self.score = make_score(CFG)
        self.model_of = Model

    def ask(self, program, params=None):
        from llm_jax.eval.lm_harness import Checkpoint
        from llm_jax.eval.served import served
        from llm_jax.eval.tasks import likelihoods_of

        params = weights_for(self.made.table) if params is None else params
        with jax.set_mesh(self.mesh):
            weights = (put_weights(params, CFG, self.mesh), {})
            likelihoods = likelihoods_of(self.score, weights, 64, 8, lambda: False)
            model = self.model_of(CFG, weights, self.made.tokenizer, likelihoods, 64, 8, lambda: False)
            return served(model, lambda asker: program(Checkpoint(asker, self.made.tokenizer)))


@pytest.fixture(scope="module")
def askers(made: Made, offline) -> Askers:
    return Askers(made)


def instances(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.slow
def test_log_likelihoods_and_greedy_flags_are_the_tables(made: Made, askers: Askers):
    # Text is spelled anew before it is scored, so that not all that the model writes is what it would write.
    written = ((context, made.greedy(context, 1)) for context in ("the", "the cat", "on", "mat", "dog"))
    likely = next(pair for pair in written if made.is_greedy(*pair))
    pairs = [("the cat", " sat"), ("", "the"), likely, ("", ""), ("the", ""), ("the", " ")]
    pairs += [((TEXT * 9).rstrip(), "\nthe")]  # far more than the window
    answers = askers.ask(lambda lm: lm.loglikelihood(instances(*pairs)))
    assert [nats for nats, _ in answers] == pytest.approx([made.nats(*pair) for pair in pairs], rel=1e-5, abs=1e-6)
    assert [greedy for _, greedy in answers] == [made.is_greedy(*pair) for pair in pairs]
    assert answers[2][1] and not answers[0][1] and answers[3] == answers[4] == (0.0, True)
    # Spaces at a context's end are asked for.
    apart, together = askers.ask(lambda lm: lm.loglikelihood(instances(("the cat ", "sat"), ("the cat", " sat"))))
    assert apart == together
    texts = [TEXT * 9, "", "x"]
    answers = askers.ask(lambda lm: lm.loglikelihood_rolling(instances(*((text,) for text in texts))))
    assert answers == pytest.approx([made.nats("", text) for text in texts], rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_texts_are_greedy_unless_they_are_to_be_sampled(made: Made, askers: Askers):
    whole = made.greedy("the cat", 9)
    greedy, drawn = {"until": ["\n\n"], "max_gen_toks": 9}, {"do_sample": True, "max_gen_toks": 9, "until": []}
    asked = [("the cat", greedy), ("the cat", drawn), ("the cat", drawn), ("the cat", greedy | {"until": whole[2:4]})]
    first, *others, cut = askers.ask(lambda lm: lm.generate_until(instances(*asked)))
    assert first == whole and cut == whole[:2]
    assert len({first, *others}) == 3  # each repetition draws anew


@pytest.mark.slow
def test_what_is_no_number_is_an_error(askers: Askers):
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), weights_for(drawn_table(300)))
    for program in (
        lambda lm: lm.loglikelihood(instances(("the", " cat"))),
        lambda lm: lm.loglikelihood_rolling(instances(("the cat",))),
        lambda lm: lm.generate_until(instances(("the", {"max_gen_toks": 3}))),
    ):
        with pytest.raises(NotFinite):
            askers.ask(program, broken)
    with pytest.raises(DataError, match="a task's text is not UTF-8"):
        askers.ask(lambda lm: lm.loglikelihood(instances(("the", "\ud800"))))


@pytest.mark.slow
def test_what_a_task_says_of_text_is_taken_at_its_word(offline):
    from llm_jax.eval.lm_harness import sampling_of

    assert sampling_of({"until": "\n", "max_new_tokens": 5}) == (Sampling(5, temperature=0.0), ("\n",))
    assert sampling_of({"temperature": 0.5, "top_k": 3}) == (Sampling(256, temperature=0.5, top_k=3), ())
    assert sampling_of({"do_sample": True})[0].temperature == 1.0
    assert sampling_of({"do_sample": False, "temperature": 0.7})[0].temperature == 0.0
    with pytest.raises(DataError, match=r"^a task's generation_kwargs have num_beams; there are until, max_gen_toks,"):
        sampling_of({"num_beams": 4})


@pytest.mark.slow
def test_tasks_that_there_are_not_are_told_in_a_line(made: Made, offline, tmp_path):
    from llm_jax.eval.lm_harness import load_tasks

    with pytest.raises(
        ConfigError, match=r"^--lm-eval helaswag: lm-eval \S+ has no such task; did you mean hellaswag\?"
    ):
        load_tasks(["helaswag"], causal=True)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file$"):
        load_tasks([str(tmp_path / "nowhere.yaml")], causal=True)
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "nameless.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "unsafe.yaml").write_text((made.tasks / "written.yaml").read_text() + "unsafe_code: true\n")
    (tmp_path / "written.jsonl").write_text((made.tasks / "written.jsonl").read_text())
    with pytest.raises(DataError, match=r"list\.yaml: Expected YAML dict"):
        load_tasks([str(tmp_path / "list.yaml")], causal=True)
    with pytest.raises(DataError, match=r"nameless\.yaml: names neither a task nor a group$"):
        load_tasks([str(tmp_path / "nameless.yaml")], causal=True)
    with pytest.raises(
        ConfigError, match=r"unsafe\.yaml: runs code that the model wrote, which llm-jax eval does not$"
    ):
        load_tasks([str(tmp_path / "unsafe.yaml")], causal=True)


@pytest.mark.slow
def test_a_masked_model_answers_with_pseudo_log_likelihoods_and_writes_nothing(made: Made, offline, tmp_path):
    """Of the bigram model, each token of which sees the one it stands at: with that hidden, what a mask is followed by.

    So nats are those of the table's row of the mask, whatever stands around.
    """
    from llm_jax.eval.lm_harness import evaluate_with_lm_eval

    masked = Run(
        name="masked",
        run_dir=str(tmp_path / "run"),
        model=CFG,
        data=DataConfig(seq_len=64),
        objective=MlmConfig(),
    )
    save(tmp_path / "run", masked, made.tokenizer, weights_for(made.table))
    with pytest.raises(Refused, match=r"written\.yaml: written has text generated, and a masked language model"):
        evaluate_with_lm_eval(str(tmp_path / "run"), None, [], made.paths)
    assert not (tmp_path / "run" / "eval.jsonl").exists()
    answered = [path for path in made.paths if "written" not in path]
    result = evaluate_with_lm_eval(str(tmp_path / "run"), None, [], answered, as_json=True)
    assert result is not None
    told = result["lm_eval"]["tasks"]
    nats_V = log_softmax(made.table)[MASK_ID]

    def nats(text: str) -> float:
        return float(sum(nats_V[i] for i in made.tokenizer.encode(text)))

    right = []
    for document in CHOICES:
        moved = " " * document["question"].endswith(" ")
        best = int(np.argmax([nats(moved + choice) for choice in document["choices"]]))
        right.append(best == document["answer"])
    assert told["choice"]["acc"] == pytest.approx(np.mean(right))
    bits = -sum(nats(document["text"]) for document in ROLLED) / math.log(2)
    assert told["rolled"]["bits_per_byte"] == pytest.approx(
        bits / sum(len(document["text"].encode()) for document in ROLLED), rel=1e-5
    )


@pytest.mark.slow
def test_a_limit_and_a_table_for_people(made: Made, offline, capsys):
    from llm_jax.eval.lm_harness import evaluate_with_lm_eval

    result = evaluate_with_lm_eval(str(made.run_dir), None, [], made.paths[:2], limit=2)
    assert result is not None
    assert [figures["samples"] for figures in result["lm_eval"]["tasks"].values()] == [2, 2]
    out = capsys.readouterr().out
    assert out.startswith("bigram after 7 steps, by lm-eval 0.4.") and "the first 2 documents of each:" in out
    assert f"{result['lm_eval']['tasks']['continued']['perplexity']:.4f}" in out and "bootstrapping" not in out


def test_without_the_extra_it_says_how_to_get_it():
    program = (
        "import sys; sys.modules['lm_eval'] = None; from llm_jax.__main__ import main; "
        "sys.exit(main(['eval', 'runs/none', '--lm-eval', 'task.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == "--lm-eval: lm_eval is not installed; python3 dev.py setup eval\n"
