"""Time of a training step, alone: python benchmarks/train_step.py --workload W1 --steps 24

The step is the one that `llm-jax train` compiles, on random tokens, AdamW included; one JSON line comes out.
"""

import argparse
import json
import statistics
import time

START = time.perf_counter()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from llm_jax.data.config import BOS_ID, SPECIAL_PIECES, DataConfig  # noqa: E402
from llm_jax.mesh import acts, make_mesh  # noqa: E402
from llm_jax.model.backends import resolve  # noqa: E402
from llm_jax.model.config import ModelConfig  # noqa: E402
from llm_jax.objective.config import CausalConfig  # noqa: E402
from llm_jax.optim.config import AdamWConfig  # noqa: E402
from llm_jax.run import Run, mesh_sizes  # noqa: E402
from llm_jax.train.config import MeshConfig, TrainConfig  # noqa: E402
from llm_jax.train.flops import CONVENTION, flops_per_token, mfu, peak_flops  # noqa: E402
from llm_jax.train.start import compile_programs  # noqa: E402
from llm_jax.train.state import init_state  # noqa: E402


def workload(layers: int, d: int, heads: int, ff: int, vocab: int, seq: int, batch: int) -> Run:
    """A dense causal run in float32 with the peers' optimizer: nothing clipped, a constant learning rate."""
    model = ModelConfig(
        d_model=d, d_ff=ff, n_layers=layers, n_heads=heads, n_kv_heads=heads, d_head=d // heads, vocab_size=vocab
    )
    return Run(
        model=model,
        data=DataConfig(seq_len=seq),
        objective=CausalConfig(),
        optim=AdamWConfig(lr=3e-4, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=None, schedule="constant"),
        train=TrainConfig(batch_rows=batch),
        mesh=MeshConfig(),
    )


# Workloads of the CPU comparison; W1 and W2 have 4096 tokens a step.
WORKLOADS = {
    "W0": workload(2, 64, 2, 172, 512, 64, 4),
    "W1": workload(4, 256, 4, 688, 8192, 256, 16),
    "W2": workload(8, 512, 8, 1376, 16384, 512, 8),
}


def measure(name: str, steps: int) -> dict[str, object]:
    """Compiles, makes two steps to warm up, times `steps` more; each is timed until its loss is on the host."""
    run = WORKLOADS[name]
    mesh = make_mesh(mesh_sizes(run.mesh, jax.device_count()))
    device = mesh.devices.flat[0]
    run = run.model_copy(update={"model": resolve(run.model, device.platform, mesh.shape["expert"])})
    with jax.set_mesh(mesh):
        # Which pieces begin a word matters to whole-word masking alone.
        word_starts_V = np.zeros((run.model.vocab_size, 2), bool)
        begun = time.perf_counter()
        step = compile_programs(run, mesh, word_starts_V, report=lambda line: None).step
        compile_s = time.perf_counter() - begun
        state = jax.jit(lambda: init_state(run.model, run.optim, run.seed))()
        rows_ABU = jax.device_put(random_rows(run), jax.NamedSharding(mesh, acts("ABU")))
        seconds, cpu_seconds, losses = [], [], []
        first_step_s = None
        for _ in range(2 + steps):
            begun, cpu_begun = time.perf_counter(), time.process_time()
            state, metrics = step(state, rows_ABU)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - begun)
            cpu_seconds.append(time.process_time() - cpu_begun)
            first_step_s = first_step_s or time.perf_counter() - START
    timed = sorted(seconds[2:])
    median = statistics.median(timed)
    tokens_per_s = run.tokens_per_step / median
    flops = flops_per_token(run.model, run.data.seq_len, run.objective)
    peak = peak_flops(device.device_kind, run.model.compute_dtype)
    stats = device.memory_stats() or {}
    return {
        "workload": name,
        "steps": steps,
        "step_ms_median": round(1e3 * median, 2),
        "step_ms_p90": round(1e3 * timed[int(0.9 * (len(timed) - 1))], 2),
        "step_ms_best": round(1e3 * timed[0], 2),
        "cpu_s_per_step": round(statistics.median(cpu_seconds[2:]), 3),
        "tokens_per_s": round(tokens_per_s, 1),
        "gflops_per_s_full": round(tokens_per_s * flops.full / 1e9, 1),
        "gflops_per_s_visible": round(tokens_per_s * flops.visible / 1e9, 1),
        "mfu": mfu(tokens_per_s, flops, peak, mesh.size),
        "mfu_convention": CONVENTION,
        "peak_flops": peak,
        "compile_s": round(compile_s, 2),
        "process_start_to_first_step_s": round(first_step_s or 0.0, 2),
        "peak_memory_bytes": stats.get("peak_bytes_in_use"),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "attention": run.model.attention,
        "compute_dtype": run.model.compute_dtype,
        "device": device.device_kind,
        "n_devices": mesh.size,
        "jax": jax.__version__,
    }


def random_rows(run: Run) -> np.ndarray:
    """One document a row, of uniformly drawn tokens: int32 [A, B, T + 1]."""
    shape = (1, run.train.batch_rows, run.data.seq_len + 1)
    rows_ABU = np.random.default_rng(0).integers(len(SPECIAL_PIECES), run.model.vocab_size, shape, dtype=np.int32)
    rows_ABU[..., 0] = BOS_ID
    return rows_ABU


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W1", help="which model and batch (default W1)")
    parser.add_argument("--steps", type=int, default=24, help="timed steps, after two to warm up (default 24)")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.workload, arguments.steps)))


if __name__ == "__main__":
    main()
