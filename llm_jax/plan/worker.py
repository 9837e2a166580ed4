"""Compiles a run's step for devices that this machine may not have; its own process, since a process has one platform.

python -m llm_jax.plan.worker ANSWER < question         both JSON, the question a line; plan.compile asks
It compiles while its stdin is open: who asked, and died, needs no answer.
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm_jax import config, exit_codes
from llm_jax.alphabet import over_slices
from llm_jax.plan.chips import GPUS_OF_A_HOST, Topology, parse
from llm_jax.run import Run, check_mesh, mesh_sizes

# Data-sheet figures of Hopper, by which XLA chooses its kernels: the form of XLA's GpuTargetConfigProto.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""
# On JAX 0.10 libtpu's offloaded scatters cannot be written as text. The program without them is read in their place:
# it communicates alike.
_READABLE = {"xla_tpu_enable_offloading_scatter_to_sparsecore": "false"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
N_TEMPORARIES = 8


def environment(topology: Topology) -> dict[str, str]:
    """What a worker's environment needs beside its parent's, before it imports jax."""
    match topology.chip.platform:
        case "tpu":
            # No metadata server is asked, and other processes may compile at the same time.
            return {
                "JAX_PLATFORMS": "cpu",
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_WORKER_ID": "0",
                "TPU_ACCELERATOR_TYPE": "v5p-8",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            }
        case "gpu":
            # JAX knows CUDA's topologies only where it may look for CUDA.
            return {"JAX_PLATFORMS": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(topology.n_devices)}


def devices_of(topology: Topology) -> list[Any]:
    """The topology's devices; of TPUs and GPUs only their description."""
    import jax
    from jax.experimental import topologies

    chip = topology.chip
    if chip.platform == "cpu":
        return jax.devices()
    if chip.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.text).devices
    hosts = max(topology.n_devices // GPUS_OF_A_HOST, 1)
    told = {"bandwidth": int(chip.bandwidth or 0), "memory": int((chip.memory or 0) / 0.75), "kind": chip.kind}
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"{hosts}x1x{topology.n_devices // hosts}",
        target_config=_HOPPER.format(**told),
    ).devices


def answer(run: Run, topology: Topology) -> dict[str, Any]:
    """What compiling the run's step for the topology tells, as JSON values; {"refused": why} where it cannot be."""
    import jax
    import numpy as np

    from llm_jax.mesh import make_mesh
    from llm_jax.model.backends import resolve
    from llm_jax.plan.arithmetic import product_flops, routed_share
    from llm_jax.plan.arrays import bytes_on_a_device, largest_arrays
    from llm_jax.train.start import trace_step

    try:
        devices = devices_of(topology)
    except Exception as error:  # noqa: BLE001  what libraries raise for what they do not know
        return {"refused": f"--topology {topology.text}: {_line(error)}"}
    sizes = mesh_sizes(run.mesh, len(devices))
    check_mesh(run, sizes)
    mesh = make_mesh(sizes, devices=devices, slices=_slices(run, topology, sizes))
    run = run.model_copy(update={"model": resolve(run.model, topology.chip.platform, sizes["expert"])})
    started = time.monotonic()
    with jax.set_mesh(mesh):
        traced = trace_step(run, mesh, np.zeros((run.model.vocab_size, 2), bool))
        lowered = traced.lower()
        share = routed_share(run.model, sizes["expert"])
        facts: dict[str, Any] = {"flops": product_flops(traced.jaxpr.jaxpr, share)}
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            arguments = sum(bytes_on_a_device(aval) for aval in traced.jaxpr.in_avals)
            facts["too_large"] = {"arguments": arguments, "temporaries": too_large(str(error))}
            facts["temporaries"] = [list(each) for each in largest_arrays(traced.jaxpr.jaxpr, N_TEMPORARIES)]
            return facts | {"seconds": time.monotonic() - started}
    domain = "process_index" if topology.chip.platform == "gpu" else "slice_index"
    domains = [getattr(device, domain, 0) or 0 for device in mesh.devices.flat]
    facts |= read(compiled, lowered, dict(mesh.shape), domains)
    return facts | {"seconds": time.monotonic() - started}


def _slices(run: Run, topology: Topology, sizes: dict[str, int]) -> int | None:
    """As a run of several hosts of GPUs has it: each is a slice, which their description does not tell."""
    hosts = topology.n_devices // GPUS_OF_A_HOST if topology.chip.platform == "gpu" else 1
    if run.mesh.slices is not None or hosts < 2:
        return run.mesh.slices
    try:
        over_slices(sizes, hosts)
    except config.ConfigError:
        return None  # then a run takes its devices in plain order
    return hosts


def read(compiled: Any, lowered: Any, axes: dict[str, int], domains: list[int]) -> dict[str, Any]:
    """A compiled program's memory, collectives, traffic and largest arrays."""
    from llm_jax.plan import hlo, traffic
    from llm_jax.plan.collectives import collectives

    try:
        text = compiled.as_text()
    except Exception:  # noqa: BLE001
        text = lowered.compile(_READABLE).as_text()
    program = hlo.parse(text)
    cost = compiled.cost_analysis() or {}
    return {
        "memory": memory(compiled.memory_analysis()),
        "collectives": [one._asdict() for one in collectives(program, axes, domains)],
        "unknown_loops": len(hlo.unknown_loops(program)),
        "moved_bytes": traffic.moved_bytes(program),
        "temporaries": [list(each) for each in traffic.largest_temporaries(program, N_TEMPORARIES)],
        "xla_flops": cost.get("flops"),
    }


def memory(stats: Any) -> dict[str, int]:
    """XLA's account of a device's memory, in bytes; what is aliased is both an argument and an output."""
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return parts | {"peak": sum(parts.values()) - 2 * parts["aliased"]}


def too_large(message: str) -> int | None:
    """Bytes that XLA would need for temporaries, from what it says of a program that does not fit; None if nothing."""
    said = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    return None if said is None else int(float(said[1]) * _UNITS[said[2]])


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def main(path: str) -> None:
    """Answers the question on stdin."""
    question = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_who_asked, name="who asked", daemon=True).start()
    run = config.from_json(Run, json.dumps(question["run"]))
    Path(path).write_text(json.dumps(answer(run, parse(question["topology"]))), encoding="utf-8")
    sys.stdout.flush()
    # libtpu's threads have nothing left to do, and take seconds to end.
    os._exit(0)


def _leave_with_who_asked() -> None:
    sys.stdin.read()
    os._exit(exit_codes.INTERRUPTED)


if __name__ == "__main__":
    main(sys.argv[1])
