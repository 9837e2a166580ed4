"""What the documents say to type is typed here, as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from llm_jax.eval.task_files import TaskFile, read_tasks
from tests.conftest import ROOT, Cli

# Few steps of a small model: what is proved is that the three programs fit together.
QUICK = (
    "train.steps=12", "optim.warmup_steps=2", "checkpoint.every=6", "eval.every=6", "eval.rows=32",
    "model.d_model=32", "model.d_ff=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=4",
    "model.d_head=8", "model.vocab_size=1024", "data.seq_len=64",
)  # fmt: skip
DATA = ROOT / ".cache" / "data"


def commands(text: str) -> list[str]:
    """The fenced bash blocks of a Markdown text."""
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def once(script: str) -> str:
    """The script without those commands of one line that stood in it before."""
    kept: list[str] = []
    typed: set[str] = set()
    for line in script.splitlines():
        command = re.sub(r"\s+# .*", "", line)
        if command not in typed:
            kept.append(line)
        if command.startswith("llm-jax ") and not command.endswith("\\"):
            typed.add(command)
    return "\n".join(kept)


def shorten(configs: Path, data: str = "") -> None:
    """Gives the tiny configs of a copy fewer updates of fewer and shorter rows, and further arguments of the data."""
    for path in configs.glob("tiny_*.py"):
        text, found = re.subn(r"steps=\d+, batch_rows=\d+", "steps=40, batch_rows=8", path.read_text())
        text, more = re.subn(r"DataConfig\(seq_len=128", f"DataConfig(seq_len=64, {data}", text)
        assert found == more == 1, path
        path.write_text(text)


def test_the_first_two_commands_are_dev_py_s() -> None:
    readme = (ROOT / "README.md").read_text()
    assert commands(readme)[:2] == ["python3 dev.py quickstart\n", "python3 dev.py test\n"]


def test_links_and_files_that_the_readme_names_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / target).exists(), target
    for config in set(re.findall(r"configs/\w+\.py", readme)):
        assert (ROOT / config).exists(), config


@pytest.mark.slow
def test_the_readme_s_commands_run_as_they_stand(tmp_path: Path) -> None:
    """All but the first two, in their order, in one shell, in a copy of the project with this environment.

    Then those of docs/evaluation.md, which go on with what the README's have trained. The copy's configs are shortened.
    """
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    shorten(tmp_path / "configs", "validation_share=0.01, test_share=0.01")
    pages = [commands((ROOT / name).read_text()) for name in ("README.md", "docs/evaluation.md")]
    script = "set -eux\n" + once("\n".join([*pages[0][2:], *pages[1]]))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_NUM", "PYTHON"))}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for run in ("tiny_causal", "own", "stopped", "mesh", "two", "rehearsal"):
        assert (tmp_path / "runs" / run / "metrics.jsonl").exists(), run
    assert (tmp_path / "runs" / "tiny_causal" / "report.html").exists()
    scored = [json.loads(line) for line in (tmp_path / "runs/tiny_causal/eval.jsonl").read_text().splitlines()]
    assert [list(row["tasks"]) for row in scored[-2:]] == [["agreement"], ["arithmetic", "imports"]]
    assert scored[-1]["suite"]["all"]["n"] > 400


def test_the_tasks_that_the_page_on_evaluation_writes_down_are_tasks(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    script = "".join(line for block in commands(page) for line in block.splitlines(True))
    written = re.sub(r"^llm-jax .*\n", "", script, flags=re.MULTILINE)
    subprocess.run(["bash", "-euc", written], cwd=tmp_path, check=True)
    kinds = {read.task.kind for read in read_tasks([str(tmp_path / "my_tasks")])}
    assert kinds == {"minimal_pairs", "multiple_choice", "calibration", "cloze", "generation"}
    for kind in get_args(TaskFile.model_fields["task"].annotation):
        name = get_args(kind.model_fields["kind"].annotation)[0]
        assert f"`{name}`" in page, name


@pytest.mark.slow
def test_quickstart_s_programs_in_a_row(cli: Cli, tmp_path: Path) -> None:
    """The three programs of `dev.py quickstart`, with few steps: it ends with a sample and the report's path."""
    run_dir = tmp_path / "runs" / "quickstart"
    trained = cli("train", str(ROOT / "configs" / "quickstart.py"), f"data.dir={DATA}", *QUICK)
    assert trained.returncode == 0, trained.stderr
    scored = cli("eval", str(run_dir))
    assert scored.returncode == 0, scored.stderr
    assert "bits per byte" in scored.stdout and "of zlib -9" in scored.stdout and "a sample, after" in scored.stdout
    assert "name out of scope" in scored.stdout and "fewer tokens" in scored.stdout
    reported = cli("report", str(run_dir))
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.strip().endswith("report.html")
    page = (run_dir / "report.html").read_text()
    assert "zlib" in page and "long lines" in page
