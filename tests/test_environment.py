"""The record of what a run ran on: one entry an attempt, and a commit only where the code is tracked."""

import json
import os
import subprocess
from pathlib import Path

import jax
import pytest

from llm_jax.train import environment

ALONE = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "module.py").write_text("x = 1\n")
    for command in (
        ["init", "-q"],
        ["add", "code"],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, env=ALONE)
    return tmp_path


def test_each_attempt_adds_an_entry(tmp_path: Path) -> None:
    environment.record(tmp_path, 0, {"backends": {"attention": "chunked"}})
    environment.record(tmp_path, 40, {"backends": {"attention": "xla"}})
    first, second = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert (first["restored_step"], second["restored_step"]) == (0, 40)
    assert (first["backends"], second["backends"]) == ({"attention": "chunked"}, {"attention": "xla"})
    assert os.listdir(tmp_path) == ["environment.json"]


def test_an_attempt_knows_versions_devices_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_flag=1")
    attempt = environment.attempt(0)
    assert attempt["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "grain"} <= attempt["versions"].keys()
    assert attempt["devices"] == {"kind": "cpu", "platform": "cpu", "count": jax.device_count()}
    assert attempt["processes"] == 1
    assert attempt["flags"]["LIBTPU_INIT_ARGS"] == "--xla_tpu_flag=1"
    assert attempt["flags"]["jax_threefry_partitionable"] is True


def test_a_commit_is_clean_until_a_tracked_file_changes(checkout: Path) -> None:
    clean = environment.commit(checkout / "code")
    assert clean is not None
    assert len(clean.commit) == 40 and not clean.changed
    (checkout / "notes.txt").write_text("untracked")
    assert environment.commit(checkout / "code") == clean
    (checkout / "code" / "module.py").write_text("x = 2\n")
    assert environment.commit(checkout / "code") == clean._replace(changed=True)


def test_code_installed_below_someone_elses_checkout_has_no_commit(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    (checkout / "site-packages" / "module.py").write_text("x = 1\n")
    assert environment.commit(checkout / "site-packages") is None


def test_code_outside_a_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert environment.commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit(Path(__file__).parent) is None
