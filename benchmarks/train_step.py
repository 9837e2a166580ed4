"""Time of a training step, alone: python benchmarks/train_step.py --workload W1 --steps 24 [path=value ...]

The step is the one that `llm-jax train` compiles, on random tokens, optimizer included; one JSON line comes out.
path=value changes the workload's run, such as model.remat=full or train.batch_rows=8.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

START = time.perf_counter()

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from turns import About, serve, timed  # noqa: E402
from workloads import WORKLOADS, random_rows  # noqa: E402

from llm_jax.config import ConfigError, override  # noqa: E402
from llm_jax.mesh import acts, compiled_for_one_call, make_mesh  # noqa: E402
from llm_jax.model.backends import resolve  # noqa: E402
from llm_jax.run import Run, mesh_sizes  # noqa: E402
from llm_jax.train.flops import CONVENTION, flops_per_token, mfu, parameters, peak_flops  # noqa: E402
from llm_jax.train.start import compile_programs  # noqa: E402
from llm_jax.train.state import init_state  # noqa: E402

IMPORTED = time.perf_counter()
# What JAX's events are called here; the last is of XLA, or of its cache on disk.
STAGES = {
    "jaxpr_trace_duration": "trace_s",
    "jaxpr_to_mlir_module_duration": "lower_s",
    "backend_compile_duration": "xla_s",
}


def stages() -> dict[str, float]:
    """The seconds of each stage, which grow from now on."""
    spent: dict[str, float] = {}

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        stage = STAGES.get(event.rpartition("/")[2])
        if stage is not None:
            spent[stage] = round(spent.get(stage, 0.0) + duration_secs, 2)

    jax.monitoring.register_event_duration_secs_listener(add)
    return spent


def training(name: str, run: Run) -> tuple[About, Callable[[], float]]:
    """What is to be said of a run on all devices of this process, and a step that returns its loss."""
    spent = stages()
    mesh = make_mesh(mesh_sizes(run.mesh, jax.device_count()))
    device = mesh.devices.flat[0]
    run = run.model_copy(update={"model": resolve(run.model, device.platform, mesh.shape["expert"])})
    with jax.set_mesh(mesh):
        # Which pieces begin a word matters to whole-word masking alone.
        word_starts_V = np.zeros((run.model.vocab_size, 2), bool)
        begun = time.perf_counter()
        program = compile_programs(run, mesh, word_starts_V, report=lambda line: None).step
        compile_s = time.perf_counter() - begun
        first = jax.jit(lambda: init_state(run.model, run.optim, run.seed), compiler_options=compiled_for_one_call())
        state = first()
        rows_ABU = jax.device_put(random_rows(run), jax.NamedSharding(mesh, acts("ABU")))

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program(state, rows_ABU)
        return float(metrics["loss"])

    begun = time.perf_counter()
    first_loss = step()
    first_step_s = compile_s + time.perf_counter() - begun
    assert isinstance(program, jax.stages.Compiled)
    memory = program.memory_analysis()
    about: About = {
        "workload": name,
        "of": "llm_jax",
        "first_loss": first_loss,
        "compile_s": round(compile_s, 2),
        # Traced, compiled and made once: what comes before it (imports, the first state) has its own figures.
        "first_step_s": round(first_step_s, 2),
        "process_start_to_first_step_s": round(time.perf_counter() - START, 2),
        "process_start_to_first_step_cpu_s": round(time.process_time(), 2),
        "import_s": round(IMPORTED - START, 2),
        **spent,
        "parameters": parameters(run.model),
        "tokens_per_step": run.tokens_per_step,
        # What the program needs on each device, as its compiler says.
        "program_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory is not None else None,
        "attention": run.model.attention,
        "grouped_matmul": run.model.moe.grouped_matmul if run.model.moe else None,
        "compute_dtype": run.model.compute_dtype,
        "device": device.device_kind,
        "n_devices": mesh.size,
        "jax": jax.__version__,
    }
    return about, step


def speed(run: Run, seconds: list[float], n_devices: int, device_kind: str) -> About:
    """Figures that follow from the seconds of steps."""
    median = statistics.median(seconds)
    tokens_per_s = run.tokens_per_step / median
    flops = flops_per_token(run.model, run.data.seq_len, run.objective)
    peak = peak_flops(device_kind, run.model.compute_dtype)
    share = mfu(tokens_per_s, flops, peak, n_devices)
    return {
        "steps": len(seconds),
        "step_ms_median": round(1e3 * median, 2),
        "step_ms_p90": round(1e3 * sorted(seconds)[int(0.9 * (len(seconds) - 1))], 2),
        "step_ms_best": round(1e3 * min(seconds), 2),
        "tokens_per_s": round(tokens_per_s, 1),
        "gflops_per_s": round(tokens_per_s * flops.full / 1e9, 1),
        "gflops_per_s_visible": round(tokens_per_s * flops.visible / 1e9, 1),
        "mfu": share,
        "mfu_visible": None if share is None else share * flops.visible / flops.full,
        "mfu_convention": CONVENTION,
        "peak_flops": peak,
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="change a field of the workload's run")
    parser.add_argument("--workload", choices=WORKLOADS, default="W1", help="which model and batch (default W1)")
    parser.add_argument("--steps", type=int, default=24, help="timed steps, after two to warm up (default 24)")
    parser.add_argument("--serve", action="store_true", help="take turns with others, as compare.py says")
    arguments = parser.parse_intermixed_args()
    try:
        run = override(WORKLOADS[arguments.workload], arguments.overrides)
    except ConfigError as error:
        sys.exit(str(error))
    about, step = training(arguments.workload, run)
    about["overrides"] = arguments.overrides
    if arguments.serve:
        serve(about, step)
        return
    timed(step, 1)
    turn = timed(step, arguments.steps)
    measured = speed(run, turn.seconds, about["n_devices"], about["device"])
    measured |= {"cpu_s_per_step": round(turn.cpu_each, 3), "others_cores": turn.others, "last_loss": step()}
    stats = jax.devices()[0].memory_stats() or {}
    measured["peak_device_bytes"] = stats.get("peak_bytes_in_use")
    measured["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(about | measured))


if __name__ == "__main__":
    main()
