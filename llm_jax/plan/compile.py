"""Asks a worker process what compiling a run's step for a topology tells, and keeps the answers."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import config, durable, exit_codes
from llm_jax.plan.chips import Topology
from llm_jax.plan.collectives import Collective
from llm_jax.plan.traffic import Temporary
from llm_jax.plan.worker import environment
from llm_jax.run import Run

FORMAT = 1
# The wheels that compile for a platform, and the extra that brings them.
_WHEELS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda13", "cuda-plan")}
_READERS = ("arithmetic", "arrays", "chips", "collectives", "hlo", "traffic", "worker")
_VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "flax", "optax")
# The modules that make the program, and those that read it.
_SOURCES = (
    "*.py",
    "model/*.py",
    "objective/*.py",
    "optim/*.py",
    "train/*.py",
    *(f"plan/{name}.py" for name in _READERS),
)
# What changes nothing about the program, or only where its files are.
_NOT_COMPILED = ("name", "run_dir", "checkpoint", "watchdog", "eval", "logging", "tokenizer")


class Impossible(exit_codes.Failure):
    """The plan cannot be made as asked."""

    exit_code = exit_codes.NO


class Compiled(NamedTuple):
    """What a compiler told of a run's step on a topology; a program that does not fit has no collectives."""

    flops: float
    """Products of matrices on all devices, counted in the jaxpr: recomputation and what masks hide included."""
    seconds: float
    """Tracing and compiling."""
    needs: int | None
    """Bytes of a device's memory, at the peak; None where the compiler refused and did not say."""
    refused: bool
    """The compiler itself found it too large."""
    memory: dict[str, int | None]
    """arguments, outputs, aliased, temporaries, code, peak; of what was refused arguments and temporaries (or None)."""
    temporaries: tuple[Temporary, ...]
    """The largest; of what was refused as traced, on a device."""
    collectives: tuple[Collective, ...]
    unknown_loops: int
    """Loops whose turns are not known; they count once."""
    moved_bytes: int
    """What a device reads and writes in its main memory."""
    xla_flops: float | None
    """XLA's own count for a device; it counts a loop once. None where it has none."""


def compiled(run: Run, topology: Topology, report: Callable[[str], None]) -> Compiled:
    """What compiling the run's step tells, from the cache or anew. Raises Impossible where it cannot be compiled."""
    check_wheels(topology)
    kept = _folder() / f"{key(run, topology)}.json"
    if kept.exists():
        report(f"compiled before: {kept}")
        return _read(json.loads(kept.read_text(encoding="utf-8")))
    report(f"compiling the step for {topology.text}; large models take minutes")
    started = time.monotonic()
    answer = _ask(run, topology)
    report(f"compiled in {time.monotonic() - started:.0f} s")
    kept.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(kept, json.dumps(answer).encode())
    return _read(answer)


def check_wheels(topology: Topology) -> None:
    """Raises Impossible, naming the extra, where the compiler of the topology's platform is not installed."""
    module, extra = _WHEELS.get(topology.chip.platform, (None, ""))
    if module is None:
        return
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise Impossible(f"--topology {topology.text} needs the extra {extra}: python3 dev.py setup {extra}")


def key(run: Run, topology: Topology) -> str:
    """What a compile depends on, as a file name: run, topology, versions, variables, and llm_jax's own source."""
    tree = {name: value for name, value in config.tree(run).items() if name not in _NOT_COMPILED}
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    told = json.dumps([FORMAT, tree, topology.text, versions(), flags], sort_keys=True)
    digest = hashlib.sha256(told.encode())
    package = Path(__file__).parents[1]
    for path in sorted(path for pattern in _SOURCES for path in package.glob(pattern)):
        digest.update(path.read_bytes())
    return f"{run.name}-{topology.text.replace(':', '-')}-{digest.hexdigest()[:16]}"


def versions() -> dict[str, str]:
    """The packages that make the program, those that are installed."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def unmatched() -> str:
    """That libtpu is another than the one JAX asks for, and what helps; programs then fail with whatever message."""
    found = versions()
    asked = re.findall(r"^libtpu==([\d.]+)\.\*", "\n".join(importlib.metadata.requires("jax") or ()), re.MULTILINE)
    if not asked or found["libtpu"].startswith(f"{asked[0]}."):
        return ""
    return f"; jax {found['jax']} asks for libtpu {asked[0]}, and this is {found['libtpu']}: python3 dev.py setup tpu"


def _ask(run: Run, topology: Topology) -> dict[str, Any]:
    question = json.dumps({"run": config.tree(run), "topology": topology.text})
    with tempfile.TemporaryDirectory() as folder:
        answered, told = Path(folder, "answer.json"), Path(folder, "told")
        command = [sys.executable, "-m", "llm_jax.plan.worker", str(answered)]
        variables = {**os.environ, **environment(topology)}
        with (
            told.open("wb") as log,
            # Its stdin stays open until it has answered: however this process ends, the worker sees it and ends too.
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables, bufsize=0) as asked,
        ):
            assert asked.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                asked.stdin.write(f"{question}\n".encode())
            asked.wait()
        if not answered.exists():
            lines = [line for line in told.read_text(errors="replace").splitlines() if line.strip()]
            last = lines[-1] if lines else f"exit code {asked.returncode}"
            advice = unmatched() if topology.chip.platform == "tpu" else ""
            raise Impossible(f"the step does not compile for {topology.text}: {last}{advice}")
        answer = json.loads(answered.read_text(encoding="utf-8"))
    if "refused" in answer:
        raise Impossible(answer["refused"])
    return answer


def _read(answer: dict[str, Any]) -> Compiled:
    refused = answer.get("too_large")
    memory = refused or answer["memory"]
    if refused is None:
        needs = memory["peak"]
    else:
        needs = None if refused["temporaries"] is None else refused["arguments"] + refused["temporaries"]
    return Compiled(
        flops=answer["flops"],
        seconds=answer["seconds"],
        needs=needs,
        refused=refused is not None,
        memory=memory,
        temporaries=tuple(Temporary(*each) for each in answer["temporaries"]),
        collectives=tuple(Collective(**{**one, "axes": tuple(one["axes"])}) for one in answer.get("collectives", ())),
        unknown_loops=answer.get("unknown_loops", 0),
        moved_bytes=answer.get("moved_bytes", 0),
        xla_flops=answer.get("xla_flops"),
    )


def _folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "llm_jax" / "plans"
