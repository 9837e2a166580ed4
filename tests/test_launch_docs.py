"""What launch/README.md says to type is typed here as it stands: on this machine, in a real Slurm, to a kubectl."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import EMULATED, ROOT, Start, free_port
from tests.slurm_lab import Slurm, running_slurm
from tests.test_docs import commands, shorten
from tests.training import lines

README = (ROOT / "launch" / "README.md").read_text()
# The first block and those of a section; every block of the file is in one of them.
TOP, LOCAL, SLURM, JOBSET, OTHERS = "", "Local", "Slurm", "Kubernetes (JobSet)", "XPK, SkyPilot, Ray"


def section(name: str) -> str:
    """The text of a section, or what comes before all that have commands."""
    if name == TOP:
        return README.partition("\n## ")[0]
    return README.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@dataclasses.dataclass(frozen=True)
class Project:
    """A copy of the project, and the environment of somebody who has installed it."""

    folder: Path
    env: Mapping[str, str]

    def type(self, text: str, env: Mapping[str, str] | None = None, timeout: float = 400) -> str:
        """What a shell prints that is given the text; it must end well, and without a traceback."""
        script = f"set -eu\n{text}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{text}\n{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    for name in ("configs", "launch", "llm_jax"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shorten(folder / "configs")
    (folder / ".venv").symlink_to(sys.prefix)
    # The text that other tests have prepared is the text of every copy.
    (ROOT / ".cache" / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data").symlink_to(ROOT / ".cache" / "data")
    (folder / "bin").mkdir()
    (folder / "bin" / "llm-jax").write_text(f'#!/bin/sh\nexec {sys.executable} -m llm_jax "$@"\n')
    (folder / "bin" / "kubectl").write_text("#!/bin/sh\ncat > kubectl.stdin\n")
    for program in (folder / "bin").iterdir():
        program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTHON", "SLURM_"))}
    kept |= {name: value for name, value in EMULATED.items() if name not in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return Project(folder, {**kept, "PATH": path, "PYTHONPATH": str(folder)})


def test_every_command_of_the_readme_is_typed_by_one_of_these_tests() -> None:
    typed = [block for name in (TOP, LOCAL, SLURM, JOBSET, OTHERS) for block in commands(section(name))]
    assert typed == commands(README) and len(typed) >= 7
    assert set(re.findall(r"^```(\w+)$", README, re.MULTILINE)) == {"bash"}
    # Commands in a line of text, with JOB for a job's number.
    assert set(inline(section(SLURM))) == {
        "scancel JOB",
        "scancel --signal=TERM JOB",
        "scontrol update jobid=JOB StartTime=now",
    }


def inline(text: str) -> list[str]:
    return re.findall(r"`((?:scancel|scontrol|sbatch) [^`]*)`", text)


def test_files_that_the_readme_names_exist_and_the_other_way_round() -> None:
    table = section("Files")
    named = set(re.findall(r"`(\w+\.yaml)`", table))
    assert named == {path.name for path in (ROOT / "launch").glob("*.yaml")}
    for path in set(re.findall(r"(?:configs|launch|llm_jax)/[\w/]+\.(?:py|yaml)", README)) - {"launch/mine.yaml"}:
        assert (ROOT / path).exists(), path


def test_what_is_only_printed(project: Project) -> None:
    (local,) = commands(section(TOP))
    assert project.type(local).count("JAX_COORDINATOR_ADDRESS=127.0.0.1:") == 2
    (jobset,) = commands(section(JOBSET))
    assert "kind: JobSet\n" in project.type(jobset)
    # And what --submit would do with it.
    project.type(jobset.rstrip() + " --submit")
    assert "kind: JobSet\n" in (project.folder / "kubectl.stdin").read_text()


@pytest.mark.slow
def test_local(project: Project) -> None:
    (rehearsal,) = commands(section(LOCAL))
    printed = project.type(rehearsal)
    assert "\n[0] mesh: data 4 x tensor 2 (8 cpu); " in printed and "\n[0] done: 20 steps; " in printed
    assert len(lines(project.folder / "runs" / "rehearsal")) == 20
    # Restarted by hand, it says that there is nothing left to do.
    assert "[0] runs/rehearsal is finished after 20 steps" in project.type(rehearsal)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["sky", "xpk"])
def test_other_tools(project: Project, start: Start, tool: str) -> None:
    """The same words on two hosts, with the variables that the tool sets on each."""
    (text,) = [block for block in commands(section(OTHERS)) if f"runs/{tool}" in block]
    port = str(free_port())
    assert text.count("8482") == (tool == "sky")
    text = text.replace("8482", port)
    running = []
    for host in "01":
        told = {
            "sky": {
                "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
                "SKYPILOT_NUM_NODES": "2",
                "SKYPILOT_NODE_RANK": host,
            },
            "xpk": {
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1",
                "JAX_COORDINATOR_PORT": port,
                "NNODES": "2",
                "NODE_RANK": host,
            },
        }[tool]
        shell = f"import os; os.execvp('bash', ['bash', '-c', {'set -eu' + chr(10) + text!r}])"
        running.append(start("-c", shell, env={**project.env, **told, "JAX_PLATFORMS": "cpu"}, cwd=project.folder))
    for process in running:
        done = process.wait(400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "mesh: data 2 (2 cpu)" in running[0].done().stdout
    assert len(lines(project.folder / "runs" / tool)) == 20


# Slurm.


@pytest.mark.slow
def test_slurm(project: Project) -> None:
    """All blocks in their order, each job to its end; and the words for a restart by hand, and for an end."""
    with running_slurm() as slurm:
        # Jobs inherit this environment: the copy's program, and a cluster that the shell knows.
        path = f"{project.folder / 'bin'}:{slurm.env['PATH']}"
        env = {**slurm.env, "PYTHONPATH": str(project.folder), "PATH": path}
        first, by_hand, array = commands(section(SLURM))
        job = submit(project, slurm, first, env)
        restart, cancel = "scancel --signal=TERM JOB", "scancel JOB"
        begin = "scontrol update jobid=JOB StartTime=now"
        metrics = project.folder / "runs" / "slurm" / "metrics.jsonl"
        slurm.wait(lambda: metrics.exists() and bool(metrics.read_text()), 200, "the first step")
        project.type(restart.replace("JOB", job), env)
        slurm.wait(lambda: slurm.job(job)[:2] == ("PENDING", 1), 60, "the restart")
        project.type(begin.replace("JOB", job), env)
        is_done(slurm, project, job)
        assert len(lines(metrics.parent)) == 20
        is_done(slurm, project, submit(project, slurm, by_hand, env))
        assert len(lines(project.folder / "runs" / "by_hand")) == 20
        assert json.loads((project.folder / "runs" / "by_hand" / "config.json").read_text())["mesh"]["fsdp"] == 4
        elements = submit(project, slurm, array, env)
        for config, element in {"tiny_mlm": 0, "tiny_moe": 1}.items():
            is_done(slurm, project, f"{elements}_{element}")
            assert len(lines(project.folder / "runs" / config)) == 20
        last = submit(project, slurm, first.replace("runs/slurm", "runs/ended"), env)
        project.type(cancel.replace("JOB", last), env)
        assert slurm.wait_for_state(last, "CANCELLED").restarts == 0


def submit(project: Project, slurm: Slurm, text: str, env: Mapping[str, str]) -> str:
    """The number of the job that the text submits."""
    printed = project.type(text, env)
    return printed.rpartition("Submitted batch job ")[2].strip()


def is_done(slurm: Slurm, project: Project, job: str) -> None:
    ended = slurm.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=300)
    logs = "".join(path.read_text() for path in (project.folder / "logs").glob("*.out"))
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), logs[-4000:]
