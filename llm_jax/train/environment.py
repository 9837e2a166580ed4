"""What a run ran on: commit, versions, devices, backends. One entry an attempt, and nothing that names a machine."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import durable

ENVIRONMENT = "environment.json"

_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "sentencepiece",
    "numpy",
)
# What changes an XLA program without a line of code: two variables, and those of JAX's options that concern numbers.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OPTIONS = ("jax_default_matmul_precision", "jax_default_prng_impl", "jax_enable_x64", "jax_threefry_partitionable")


class Commit(NamedTuple):
    """The code's git commit, and whether tracked files differ from it."""

    commit: str
    changed: bool


def record(run_dir: str | os.PathLike[str], restored_step: int, facts: Mapping[str, Any]) -> None:
    """Appends this attempt to the run's environment.json, with the facts that only the caller knows; process 0 only.

    restored_step: updates made by earlier attempts; facts: JSON values by name, such as the resolved backends.
    """
    path = Path(run_dir, ENVIRONMENT)
    attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"] if path.exists() else []
    attempts.append({**attempt(restored_step), **facts})
    durable.replace(path, (json.dumps({"attempts": attempts}, indent=2) + "\n").encode())


def attempt(restored_step: int) -> dict[str, Any]:
    """What is known of this process's surroundings, as JSON values."""
    import jax  # here, since whoever only reads the record needs none

    code = commit(Path(__file__).parent)
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "restored_step": restored_step,
        "commit": code and code.commit,
        "changed_since_commit": code and code.changed,
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "processes": jax.process_count(),
        "flags": {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
        | {name: jax.config.values[name] for name in _OPTIONS},
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that make the numbers, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(directory: Path) -> Commit | None:
    """The commit of the checkout that a directory's code belongs to; None if git is missing, or does not track it."""
    # Code installed below someone else's checkout is not theirs: only tracked files tell.
    if not _git(directory, "ls-files"):
        return None
    head = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return None if head is None or changes is None else Commit(head, changes != "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", directory, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
