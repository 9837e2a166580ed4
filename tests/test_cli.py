"""The command line from outside: exit codes, what goes to stderr, and what is not imported."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax import exit_codes
from llm_jax.__main__ import VERBS
from llm_jax.config import override, to_json
from llm_jax.run import from_command_line

ROOT = Path(__file__).parents[1]
TINY = "configs/tiny_causal.py"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def llm_jax(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "llm_jax", *arguments, **environment)


IMPORTED = """
import sys
from llm_jax.__main__ import main
code = main(sys.argv[1:])
print(sorted({"jax", "optax", "flax"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["config", TINY], 0),
        (["config", TINY, "model.d_modle=3"], 2),
        (["config", TINY, "mesh.tensor=3"], 2),
        (["--help"], 0),
    ],
)
def test_a_config_is_answered_without_jax(arguments: list[str], code: int) -> None:
    done = python("-c", IMPORTED, *arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_proof_that_jax_is_not_imported_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "eager.py"
    path.write_text("import optax\nfrom llm_jax.run import Run\ndef config(): return Run()\n")
    done = python("-c", IMPORTED, "config", str(path))
    assert done.stderr.splitlines()[-1] == "['jax', 'optax']"


def test_config_shows_every_field_and_marks_what_is_not_the_default() -> None:
    done = llm_jax("config", TINY, "optim.clip_norm=null")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()

    def line(path: str) -> str:
        (found,) = [line for line in lines if line[1:].split()[:1] == [path]]
        return " ".join(found.split())

    assert (
        line("model.d_model")
        == "* model.d_model 64 a whole number at least 1; default 256 Width of the residual stream (D)."
    )
    assert line("model.n_heads") == "model.n_heads 4 a whole number at least 1 Query heads (H)."
    assert line("optim.clip_norm").startswith(
        "* optim.clip_norm null a number more than 0 or null; default 1.0 Largest"
    )
    assert "optim: How the weights move." in lines
    run = override(from_command_line(ROOT / TINY, []), ["optim.clip_norm=null"])
    for section, fields in json.loads(to_json(run)).items():
        for field in fields if isinstance(fields, dict) else ():
            if (section, field) != ("data", "source"):
                assert line(f"{section}.{field}")


def test_config_as_json_is_the_run_and_nothing_else() -> None:
    done = llm_jax("config", TINY, "--json", "data.source.kind=files", 'data.source.paths=["a b"]', "model.remat=dots")
    run = from_command_line(ROOT / TINY, ["model.remat=dots", "data.source.paths=a b", "data.source.kind=files"])
    assert (done.returncode, done.stdout, done.stderr) == (0, to_json(run), "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["confg"], "llm-jax confg: no such verb; did you mean config?\n"),
        (["zzz"], f"llm-jax zzz: no such verb; the verbs are {', '.join(VERBS)}\n"),
        (
            ["config", "--json"],
            """llm-jax config: the following arguments are required: config; llm-jax config --help shows how it is used
""",
        ),
        (
            ["config", "configs/tiny_casual.py"],
            "configs/tiny_casual.py: no such file; did you mean configs/tiny_causal.py?\n",
        ),
        (
            ["config", "train.steps=3"],
            "train.steps=3: no such file; the first argument is a config file, and overrides follow it\n",
        ),
        (["config", TINY, "--josn"], "llm-jax config: --josn: no such option; did you mean --json?\n"),
        (
            ["config", TINY, "--train.steps=3", "seed=1"],
            "llm-jax config: --train.steps=3: no such option; an override has no dashes: train.steps=3\n",
        ),
        (
            ["config", TINY, "seed=x", "optim.b1=1.5", "model.d_modle=3"],
            """seed = 'x': must be a whole number
model.d_modle: no such field; did you mean d_model?
optim.b1 = 1.5: must be less than 1
""",
        ),
        (["config", TINY, "mesh.tensor=3"], "model.d_ff = 176 is not divisible by mesh.tensor = 3\n"),
    ],
)
def test_mistakes_are_lines_on_stderr_and_exit_code_2(arguments: list[str], told: str) -> None:
    done = llm_jax(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (exit_codes.USAGE, "", told)


def test_help_names_every_verb_and_exit_code() -> None:
    done = llm_jax("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, meaning in [*VERBS.items(), *((str(code), meaning) for code, meaning in exit_codes.MEANINGS.items())]:
        assert any(line.split() == [name, *meaning.split()] for line in done.stdout.splitlines()), name
    codes = {value for value in vars(exit_codes).values() if isinstance(value, int)}
    assert codes == set(exit_codes.MEANINGS)
    bare = llm_jax()
    assert (bare.returncode, bare.stdout, bare.stderr) == (exit_codes.USAGE, "", done.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_itself(verb: str) -> None:
    done = llm_jax(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: llm-jax" in done.stdout and "examples:\n" in done.stdout


def test_what_is_not_foreseen_shows_its_traceback_and_exits_with_1() -> None:
    if not Path("/dev/full").exists():
        pytest.fail("this test needs /dev/full, a disk that is always full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "llm_jax", "config", TINY],
            check=False,
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == exit_codes.UNEXPECTED
    assert done.stderr.startswith("Traceback") and "No space left on device" in done.stderr


def test_ctrl_c_exits_with_130(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    child = subprocess.Popen(
        [sys.executable, "-m", "llm_jax", "config", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "waiting\n"
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=30)
    assert (child.returncode, told) == (exit_codes.INTERRUPTED, "interrupted\n")


RANK = """
import sys, time, jax
port, rank = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
print("joined", flush=True)
if rank == "0":
    time.sleep(600)
from llm_jax.__main__ import main
sys.exit(main(["config", "configs/none.py"]))
"""


def test_of_several_processes_the_one_that_fails_does_not_wait_for_the_others() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, port, rank],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        joined, told = ranks[1].communicate(timeout=60)
        assert ranks[1].returncode == exit_codes.USAGE, told
        assert joined == "joined\n" and "configs/none.py: no such file" in told
        assert ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
