"""Time of the experts' grouped matmul, forward and backward: python benchmarks/grouped_matmul.py --rounds 12

Each backend multiplies the same rows, in turn, so that other load on the machine falls on all of them; one JSON line
for each. dense is one product of all rows with one matrix: no grouped one can be faster. blocked multiplies blocks of
rows, so that its groups end in rows for nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llm_jax.model.grouped_matmul import KERNELS, group_rows, grouped_matmul

Product = Callable[[Array, Array, Array], Array]


def products(rows: int) -> dict[str, Product]:
    """Each backend that this machine has; blocked in blocks of so many rows."""
    backends: dict[str, Product] = {
        "blocked": lambda x_RD, weight_EDF, sizes_E: grouped_matmul(x_RD, weight_EDF, sizes_E, "blocked", rows),
        "ragged_dot": lambda x_RD, weight_EDF, sizes_E: jax.lax.ragged_dot(x_RD, weight_EDF, sizes_E),
        "dense": lambda x_RD, weight_EDF, sizes_E: x_RD @ weight_EDF[0],
    }
    kernel = KERNELS.get(jax.default_backend())
    if kernel is not None:
        backends[kernel] = lambda x_RD, weight_EDF, sizes_E: grouped_matmul(x_RD, weight_EDF, sizes_E, kernel)
    return backends


def forward_and_backward(product: Product) -> Callable[..., Any]:
    """The compiled function (x_RD, weight_EDF, sizes_E, dy_RF) -> (y_RF, (dx_RD, dweight_EDF))."""

    def both(x_RD: Array, weight_EDF: Array, sizes_E: Array, dy_RF: Array) -> Any:
        y_RF, pull = jax.vjp(lambda x, weight: product(x, weight, sizes_E), x_RD, weight_EDF)
        return y_RF, pull(dy_RF)

    return jax.jit(both)


def arguments_of(tokens: int, d: int, f: int, experts: int, top_k: int, dtype: str, rows: int) -> tuple[Array, ...]:
    """Rows of tokens that chose top_k experts each, some much more often than others; groups in multiples of `rows`."""
    rng = np.random.default_rng(0)
    R = tokens * top_k
    sizes_E = np.bincount(rng.choice(experts, R, p=rng.dirichlet(np.full(experts, 4.0))), minlength=experts)
    sizes_E = -(-sizes_E // rows) * rows
    R = R if rows == 1 else (-(-R // rows) + experts - 1) * rows
    shapes = (R, d), (experts, d, f), (R, f)
    x_RD, weight_EDF, dy_RF = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return x_RD, weight_EDF, jnp.asarray(sizes_E, jnp.int32), dy_RF


def measure(rounds: int, shape: dict[str, int], dtype: str, rows: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds and CPU seconds of each round, by backend."""
    functions = {name: forward_and_backward(product) for name, product in products(rows).items()}
    in_blocks, exact = arguments_of(**shape, dtype=dtype, rows=rows), arguments_of(**shape, dtype=dtype, rows=1)
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            begun, cpu_begun = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(*(in_blocks if name == "blocked" else exact)))
            if round_number > 0:  # the first compiles
                taken[name][0].append(time.perf_counter() - begun)
                taken[name][1].append(time.process_time() - cpu_begun)
    return taken


def main() -> None:
    """Prints one JSON line a backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds (default 12)")
    for name, default in {"tokens": 4096, "d": 256, "f": 344, "experts": 8, "top-k": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    chosen = parser.parse_args()
    shape = {"tokens": chosen.tokens, "d": chosen.d, "f": chosen.f, "experts": chosen.experts, "top_k": chosen.top_k}
    rows = group_rows("blocked", chosen.tokens * chosen.top_k, chosen.experts)
    taken = measure(chosen.rounds, shape, chosen.dtype, rows)
    reference = statistics.median(taken["ragged_dot"][0])
    device = jax.devices()[0]
    for name, (seconds, cpu_seconds) in taken.items():
        median = statistics.median(seconds)
        line = {
            "backend": name,
            "ms_median": round(1e3 * median, 2),
            "ms_best": round(1e3 * min(seconds), 2),
            "cpu_ms_median": round(1e3 * statistics.median(cpu_seconds), 2),
            "times_faster_than_ragged_dot": round(reference / median, 2),
            "rounds": chosen.rounds,
            **shape,
            "dtype": chosen.dtype,
            "block_rows": rows,
            "device": device.device_kind,
            "jax": jax.__version__,
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
