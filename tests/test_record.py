"""`benchmarks/record.py` keeps what a benchmark printed with the commit that it ran from, and with nobody's folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BENCHMARK = """
import json, sys
print(json.dumps({"arguments": sys.argv[1:]}))
print("chatter")
sys.exit(3)
"""


def git(checkout: Path, *arguments: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *named, *arguments], cwd=checkout, check=True, capture_output=True, text=True).stdout


def record(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/record.py", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("record.py", "turns.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder / name)
    (folder / "some.py").write_text(BENCHMARK)
    return tmp_path


def committed(checkout: Path) -> str:
    git(checkout, "init")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-m", "all")
    return git(checkout, "rev-parse", "--short", "HEAD").strip()


def kept(checkout: Path) -> list[dict[str, object]]:
    (file,) = (checkout / "benchmarks" / "results").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_are_kept_with_commit_and_without_folders(checkout: Path) -> None:
    commit = committed(checkout)
    given = ["some.py", "--jax", "nanodo=/home/me/bin/python", "--torch", "/home/me/python", "model.remat=full"]
    for _ in range(2):
        done = record(checkout, *given)
        assert done.returncode == 3 and done.stdout.splitlines()[1] == "chatter", done.stderr
    first, second = kept(checkout)
    assert first == second
    assert first["commit"] == commit and str(first["machine"]).endswith("cores")
    assert first["command"] == "some.py --jax nanodo=python --torch python model.remat=full"
    assert first["arguments"] == given[1:]


def test_a_copy_without_git_has_no_commit(checkout: Path) -> None:
    assert record(checkout, "some.py").returncode == 3
    assert kept(checkout)[0]["commit"] is None


def test_what_is_not_committed_is_not_measured(checkout: Path) -> None:
    committed(checkout)
    (checkout / "benchmarks" / "some.py").write_text("print('changed')")
    done = record(checkout, "some.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "record.py: commit what is changed first: benchmarks/some.py\n"


@pytest.mark.parametrize("name", ["none.py", "../some.py", "results"])
def test_only_benchmarks_are_run(checkout: Path, name: str) -> None:
    done = record(checkout, name)
    assert done.returncode == 2
    assert done.stderr == f"record.py: no such benchmark: {name}; there are record.py, some.py, turns.py\n"
