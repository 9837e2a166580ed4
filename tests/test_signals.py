"""SIGTERM and Ctrl-C outside the loop, sent to real processes: 75 and 130, soon, and nothing half-done is left."""

import functools
import shutil
import signal
import time
from pathlib import Path

import pytest

from llm_jax.data.config import TokenizerConfig
from llm_jax.data.prepare import Stopped, prepare
from llm_jax.guards import Guards
from tests import data_texts
from tests.conftest import Running, Start, free_port, listens
from tests.training import copy_at, newest, train, wait_for

SIGNALS = [(signal.SIGTERM, 75), (signal.SIGINT, 130)]

# `llm-jax ARGUMENTS` where each call of MODULE's FUNCTION leaves a file behind and then takes SECONDS longer.
SLOWED = """
import importlib, pathlib, sys, time
module, function, marker, seconds = sys.argv[1:5]
owner = importlib.import_module(module)
real = getattr(owner, function)
def slowed(*args, **settings):
    pathlib.Path(marker).touch()
    time.sleep(float(seconds))
    return real(*args, **settings)
setattr(owner, function, slowed)
from llm_jax.__main__ import main
sys.exit(main(sys.argv[5:]))
"""
# The same, for each item that FUNCTION yields.
SLOWED_ITEMS = SLOWED.replace(
    """    pathlib.Path(marker).touch()
    time.sleep(float(seconds))
    return real(*args, **settings)
""",
    """    for item in real(*args, **settings):
        pathlib.Path(marker).touch()
        time.sleep(float(seconds))
        yield item
""",
)
# `llm-jax ARGUMENTS` where importing JAX leaves a file behind and then takes a minute longer.
SLOW_IMPORT = """
import pathlib, sys, time
class Slow:
    def find_spec(self, name, path, target=None):
        if name == "jax":
            pathlib.Path(sys.argv[1]).touch()
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from llm_jax.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def told(running: Running, number: int, code: int, timeout: float = 240) -> str:
    """Sends the signal, and holds the process to its exit code and to ending without a traceback; what it said."""
    running.process.send_signal(number)
    return ended(running, code, timeout)


def ended(running: Running, code: int, timeout: float = 240) -> str:
    done = running.wait(timeout)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def of_two(port: int, process: int) -> dict[str, str]:
    """The environment of one of two processes."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return dict(zip(names, (f"127.0.0.1:{port}", "2", str(process)), strict=True))


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_during_imports(start: Start, tmp_path: Path, number: int, code: int) -> None:
    marker = tmp_path / "importing"
    running = start("-c", SLOW_IMPORT, str(marker), *train(tmp_path / "run")[2:])
    wait_for(marker.exists, running)
    assert "nothing had begun that would have to be saved" in told(running, number, code, timeout=20)
    assert not (tmp_path / "run").exists()


# A mutex that is locked twice: C that waits for ever, and goes on waiting when a signal comes.
STUCK = """
import ctypes, pathlib, sys
from llm_jax.early_signals import leaving_at_once
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with leaving_at_once():
    libc.pthread_mutex_lock(mutex)
    pathlib.Path(sys.argv[1]).touch()
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_while_c_does_not_return(start: Start, tmp_path: Path, number: int, code: int) -> None:
    """A handler in Python alone would wait with it."""
    marker = tmp_path / "locked"
    running = start("-c", STUCK, str(marker))
    wait_for(marker.exists, running)
    assert "nothing had begun that would have to be saved" in told(running, number, code, timeout=20)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_while_others_are_waited_for(start: Start, tmp_path: Path, number: int, code: int) -> None:
    port = free_port()
    running = start(*train(tmp_path / "run"), env=of_two(port, 0))
    wait_for(functools.partial(listens, port), running)
    assert "nothing had begun that would have to be saved" in told(running, number, code, timeout=20)


# `llm-jax VERB` of one of several processes, whose exit code is decided, and which takes a while to go.
SLOW_TO_GO = """
import os, sys, time
import jax
from llm_jax import __main__ as program, early_signals
class Slow:  # when it goes, modules are half gone
    def __del__(self, mkdir=os.mkdir, marker=sys.argv[1], sleep=time.sleep, seconds=float(sys.argv[3])):
        mkdir(marker)
        sleep(seconds)
slow = Slow()
def verb(argv):
    with early_signals.leaving_at_once():
        jax.distributed.initialize(sys.argv[2], 1, 0)
    return 75
program.run_verb = verb
sys.exit(program.main(["train"]))
"""


def test_what_was_decided_stands_while_the_process_goes(start: Start, tmp_path: Path) -> None:
    """Its peers are gone, so a launcher sends SIGTERM: a death by it would count as a failure where 75 does not."""
    marker = tmp_path / "going"
    running = start("-c", SLOW_TO_GO, str(marker), f"127.0.0.1:{free_port()}", "3")
    wait_for(marker.exists, running)
    told(running, signal.SIGTERM, 75, timeout=60)


def test_preparing_stops_between_two_stages(tmp_path: Path) -> None:
    """What is finished stays, and is not made again."""
    data = data_texts.config(data_texts.write_files(tmp_path / "texts"), into=tmp_path / "data")
    said: list[str] = []
    with pytest.raises(Stopped):
        prepare(data, TokenizerConfig(), 400, 0, said.append, stop=lambda: bool(said))
    assert [line.split()[0] for line in said] == ["text"]
    prepare(data, TokenizerConfig(), 400, 0, said.append, stop=lambda: False)
    assert [line.split()[0] for line in said] == ["text", "tokenizer", "rows"]


def test_guards_give_back_what_they_took() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Guards() as guards:
        assert not guards.stop() and not guards.heard() and not guards.stopped
        signal.raise_signal(signal.SIGTERM)
        assert guards.heard() and not guards.stopped
        assert guards.stop() and guards.stopped and guards.exit_code == 75
        signal.raise_signal(signal.SIGINT)
        assert guards.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == {number: signal.getsignal(number) for number in before}


PHASES = {
    "preparation": ("llm_jax.data.stages", "write_tokenizer"),
    "restore": ("llm_jax.train.start", "state_at"),
    "compile": ("llm_jax.train.attempt", "compile_programs"),
}


def small_text(tmp_path: Path) -> tuple[str, ...]:
    """Overrides for data of its own, that has to be prepared."""
    folder = data_texts.write_files(tmp_path / "texts")
    return (
        f"data.dir={tmp_path / 'data'}",
        "data.source.kind=files",
        f"data.source.paths={folder}",
        "model.vocab_size=400",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [("preparation", signal.SIGTERM, 75), ("restore", signal.SIGINT, 130), ("compile", signal.SIGTERM, 75)],
)
def test_before_the_first_step(
    uninterrupted: Path, start: Start, tmp_path: Path, phase: str, number: int, code: int
) -> None:
    """The call in progress returns; nothing new is saved, and the same command goes on from there."""
    marker, run_dir = tmp_path / "begun", tmp_path / "run"
    overrides = ()
    if phase == "preparation":
        overrides = (*small_text(tmp_path), "train.steps=4", "optim.warmup_steps=0")
    else:
        run_dir = copy_at(uninterrupted, tmp_path, 20)
    running = start("-c", SLOWED, *PHASES[phase], str(marker), "2", *train(run_dir, *overrides)[2:])
    wait_for(marker.exists, running)
    assert "stopped before the first step, with nothing new to save" in told(running, number, code)
    if phase == "preparation":
        made = {path.parent.name.partition("-")[0] for path in (tmp_path / "data").glob("*/*/info.json")}
        assert made == {"text", "tokenizer"}
    else:
        assert newest(run_dir) == 20
    done = start(*train(run_dir, *overrides)).wait()
    assert done.returncode == 0, done.stderr
    assert "text [" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "target"), [("preparation", 0), ("preparation", 1), ("restore", 1), ("compile", 0)])
def test_before_the_first_step_with_two(
    uninterrupted: Path, start: Start, tmp_path: Path, phase: str, target: int
) -> None:
    """SIGTERM to one of two, while both are at it, or process 0 prepares for both: 75 on both."""
    run_dir, port = tmp_path / "run", free_port()
    overrides = ()
    if phase == "preparation":
        overrides = (*small_text(tmp_path), "train.steps=4", "optim.warmup_steps=0")
    else:
        run_dir = copy_at(uninterrupted, tmp_path, 20)
    markers = [tmp_path / f"begun{i}" for i in range(2)]
    # JAX looks for a signal once a second.
    both = [
        start("-c", SLOWED, *PHASES[phase], str(markers[i]), "4", *train(run_dir, *overrides)[2:], env=of_two(port, i))
        for i in range(2)
    ]
    wait_for(markers[0].exists, both[0])
    both[target].process.send_signal(signal.SIGTERM)
    texts = [ended(running, 75) for running in both]
    assert "stopped before the first step, with nothing new to save" in texts[0]
    if phase == "preparation":
        made = {path.parent.name.partition("-")[0] for path in (tmp_path / "data").glob("*/*/info.json")}
        assert made == {"text", "tokenizer"}
    else:
        assert newest(run_dir) == 20


BATCHES = ("llm_jax.eval.perplexity", "batched")


@pytest.mark.parametrize(("number", "code"), [SIGNALS[0], pytest.param(*SIGNALS[1], marks=pytest.mark.slow)])
def test_evaluation(uninterrupted: Path, start: Start, tmp_path: Path, number: int, code: int) -> None:
    """It stops after the batch in progress, and writes no result."""
    run_dir, marker = tmp_path / "run", tmp_path / "begun"
    shutil.copytree(uninterrupted, run_dir)
    running = start("-c", SLOWED_ITEMS, *BATCHES, str(marker), "0.5", "eval", str(run_dir))
    wait_for(marker.exists, running)
    begun = time.monotonic()
    text = told(running, number, code)
    assert time.monotonic() - begun < 30
    assert "stopping after this batch; Ctrl-C again stops at once" in text and "stopped before the end" in text
    assert not (run_dir / "eval.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 1])
def test_evaluation_with_two(uninterrupted: Path, start: Start, tmp_path: Path, target: int) -> None:
    """SIGTERM to one of two stops both at the same batch."""
    run_dir, port = tmp_path / "run", free_port()
    shutil.copytree(uninterrupted, run_dir)
    markers = [tmp_path / f"begun{i}" for i in range(2)]
    both = [
        start(
            "-c", SLOWED_ITEMS, *BATCHES, str(markers[i]), "0.5", "eval", str(run_dir), devices=2, env=of_two(port, i)
        )
        for i in range(2)
    ]
    wait_for(markers[0].exists, both[0])
    both[target].process.send_signal(signal.SIGTERM)
    for running in both:
        assert "stopped before the end" in ended(running, 75)
    assert not (run_dir / "eval.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_generation(uninterrupted: Path, start: Start, tmp_path: Path, number: int, code: int) -> None:
    """It stops after a token."""
    marker = tmp_path / "begun"
    running = start(
        *("-c", SLOWED_ITEMS, "llm_jax.eval.generation", "decoding", str(marker), "0.5"),
        *("generate", str(uninterrupted), "--prompt", "import"),
    )
    wait_for(marker.exists, running)
    text = told(running, number, code)
    assert text.startswith("import") and "stopped before the end" in text
