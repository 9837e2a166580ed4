"""Runs a benchmark and keeps what it prints: python benchmarks/record.py compare.py --workload W1 --torch PYTHON

Its JSON lines go to stdout as without this, and to benchmarks/results/DATE-MACHINE.jsonl, each with the date (UTC), the
commit, the machine and the arguments; of a path among these only its last part. The commit has to be what is measured:
while git sees changes in its files nothing is run (exit code 2).
"""

import datetime
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from turns import CORES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main(arguments: Sequence[str]) -> int:
    """The benchmark's exit code; 2 where there is nothing to run, or nothing to record it with."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    benchmark = HERE / arguments[0]
    if benchmark.parent != HERE or not benchmark.is_file():
        known = ", ".join(sorted(path.name for path in HERE.glob("*.py")))
        return refused(f"no such benchmark: {arguments[0]}; there are {known}")
    changed = git("diff", "--name-only", "HEAD", "--", ":!benchmarks/results").split()
    if changed:
        return refused(f"commit what is changed first: {', '.join(changed)}")
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") or None,
        "machine": machine(),
        "command": " ".join([arguments[0], *(last_part(a) for a in arguments[1:])]),
    }
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{stamp['date']}-{stamp['machine']}".lower()).strip("-")
    with subprocess.Popen(
        [sys.executable, str(benchmark), *arguments[1:]], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as kept:
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith("{"):
                    print(json.dumps(stamp | json.loads(line)), file=kept, flush=True)
    return process.returncode


def refused(why: str) -> int:
    """Says why in one line."""
    print(f"record.py: {why}", file=sys.stderr)
    return 2


def git(*arguments: str) -> str:
    """What git says of this checkout; nothing of a copy that is none."""
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def last_part(argument: str) -> str:
    """An argument without the folders of a path in it: where somebody keeps an interpreter is no part of a result."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name if value.startswith(('/', '~', '.')) else value}"


def machine() -> str:
    """The GPUs or the processor, and how many cores this process may use, such as "AMD EPYC, 26.2, 4 cores"."""
    return ", ".join([*_gpus(), *_processor(), f"{CORES} cores"])


def _gpus() -> Iterator[str]:
    """NVIDIA's, as their own tool names them."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return
    for name in sorted(set(listed)):
        yield f"{listed.count(name)} {name}"


def _processor() -> Iterator[str]:
    """Its name, and its family and model: a cloud's machines often give no more than a brand."""
    try:
        about = dict(re.findall(r"^([^:\n]*?)\s*: (.*)$", Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0], re.M))
    except OSError:
        about = {}
    yield about.get("model name", platform.machine())
    if "cpu family" in about and "model" in about:
        yield f"{about['cpu family']}.{about['model']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
