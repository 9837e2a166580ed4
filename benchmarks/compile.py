"""How long the step compiles: python benchmarks/compile.py --workload W1 --layers 4 32 [path=value ...]

Each number of layers in a process of its own, so that none has another's work in its caches; layers of one kind are one
scan, so the time should hardly grow. One JSON line for each, of a run with an empty compile cache on disk (cold) and of
the next, which finds all in it (warm): seconds until the first step has ended, from the start of the process, its CPU
seconds, and where they went: imports; all programs' tracing, lowering, and compiling or loading; compile_s is what all
three take for the step alone, and first_step_s that and making it once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workloads import WORKLOADS

FIGURES = (
    "process_start_to_first_step_s",
    "process_start_to_first_step_cpu_s",
    "first_step_s",
    "compile_s",
    "import_s",
    "trace_s",
    "lower_s",
    "xla_s",
)


def one(workload: str, layers: int, overrides: list[str], cache: str) -> dict[str, Any]:
    """train_step.py's line for one step."""
    kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    step = [sys.executable, str(Path(__file__).with_name("train_step.py")), "--workload", workload, "--steps", "1"]
    command = [*step, f"model.n_layers={layers}", *overrides]
    done = subprocess.run(command, env=os.environ | kept, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints a JSON line for each number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="change a field of the workload's run")
    parser.add_argument("--workload", choices=WORKLOADS, default="W1", help="which model and batch (default W1)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32], help="(default 4 32)")
    arguments = parser.parse_intermixed_args()
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (one(arguments.workload, layers, arguments.overrides, cache) for _ in range(2))
        figures = {f"{name}_{how}": line[name] for how, line in (("cold", cold), ("warm", warm)) for name in FIGURES}
        about = {name: cold[name] for name in ("workload", "overrides", "device", "jax")}
        print(json.dumps({"layers": layers} | figures | about), flush=True)


if __name__ == "__main__":
    main()
