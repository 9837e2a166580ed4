"""How a job's processes find each other, before the first use of a device: told by the environment, never silently."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from jax._src import clusters, distributed  # what Slurm, Open MPI and TPUs say, and the service all have joined

from llm_jax import exit_codes
from llm_jax.config import ConfigError

# Detected in this order; Kubernetes says it with the three variables.
LAUNCHERS: Mapping[str, type[clusters.ClusterEnv]] = {
    "Open MPI": clusters.OmpiCluster,
    "Slurm": clusters.SlurmCluster,
    "GKE": clusters.GkeTpuCluster,
    "the TPU's metadata": clusters.GceTpuCluster,
}

# How long a port may still be held by the job's last life.
PORT_PATIENCE_S = 10.0
# When whoever waits is first told what for, and how often after that.
FIRST_WORD_S = 5.0
WORD_EVERY_S = 30.0
# JAX's own limit ends the process with a stack trace; it has to come after ours.
MARGIN_S = 60


class CannotJoin(exit_codes.Failure):
    """The job's processes cannot come together as they were started."""

    exit_code = exit_codes.NO


class NobodyCame(exit_codes.Failure):
    """The job's processes did not come together in time; a restart may help."""

    exit_code = exit_codes.STALLED


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process was told: where process 0 is, how many there are, which one it is, and its devices."""

    host: str
    port: int
    processes: int
    process: int
    devices: tuple[int, ...] | None
    """Numbers of the GPUs of this machine that it uses; None for all."""

    @property
    def address(self) -> str:
        """As JAX wants it."""
        return f"{self.host}:{self.port}"


def join_processes(heartbeat_s: int, patience_s: int) -> None:
    """Joins the job's other processes, where the environment tells of any; comes before the first use of a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID decide where they are set, else what JAX detects
    (Open MPI, Slurm, TPU pods). JAX_LOCAL_DEVICE_IDS always says which GPUs are this process's. A process that is
    silent for heartbeat_s later ends the job; patience_s is how long this one waits for the others now.

    Raises ConfigError for an environment that makes no sense, CannotJoin where the port is taken or other processes
    were told otherwise, NobodyCame where some do not come in time.
    """
    job = read_job(patience_s)
    order_collectives(job.processes)
    if job.processes == 1:
        _restrict(job.devices)
    else:
        if job.process == 0:
            demand_port(job.port)
        # A proxy knows no way to other machines of a cluster, and gRPC would ask one; it reads the name in lower case.
        os.environ["no_grpc_proxy"] = job.host  # noqa: SIM112
        jax.config.update("jax_check_proxy_envs", False)
        connect(job, heartbeat_s, patience_s)
        agree_on_number(job)
    if jax.process_count() != job.processes:
        raise CannotJoin(f"{jax.process_count()} of the {job.processes} processes that the launcher advertises joined")


def order_collectives(processes: int) -> None:
    """Has XLA begin the collectives of a program for CPUs in the same order on every device.

    Comes before the first program. With its scheduler for concurrency, devices on a mesh of two axes wait for each
    other for ever, each in another collective: 4 of 7 runs of 2 processes x 4 devices did within 150 steps (JAX 0.10),
    and 3 of 6 of one process with 8 devices within 3 (JAX 0.12, which aborts after 40 s); none of 14 without it, which
    were as fast. One device waits for nobody, and keeps the scheduler.
    """
    flag, flags = "--xla_cpu_enable_concurrency_optimized_scheduler", os.environ.get("XLA_FLAGS", "")
    emulated = jax.config.values["jax_num_cpu_devices"] > 1 or "xla_force_host_platform_device_count" in flags
    on_cpus = (jax.config.values["jax_platforms"] or "").startswith("cpu")
    if (emulated or (processes > 1 and on_cpus)) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


def read_job(patience_s: int) -> Job:
    """What the environment says. Raises ConfigError where it contradicts itself, or a launcher says too little."""
    devices = _device_numbers()
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name)]
    if names[1] in missing and names[2] in missing:
        launcher = next((name for name, cluster in LAUNCHERS.items() if cluster.is_env_present()), None)
        # The address alone may correct what a launcher says.
        if launcher or names[0] in missing:
            return _detected(launcher, devices, patience_s)
    if missing:
        raise ConfigError(f"{', '.join(missing)} not set; several processes need all of the three variables")
    processes, process = _whole_number(names[1]), _whole_number(names[2])
    if process >= processes:
        raise ConfigError(f"JAX_PROCESS_ID = {process}: must be less than JAX_NUM_PROCESSES = {processes}")
    return Job(*_host_and_port(os.environ[names[0]]), processes, process, devices)


def _detected(launcher: str | None, devices: tuple[int, ...] | None, patience_s: int) -> Job:
    if launcher is None:
        demand_nobody_else()
        return Job("localhost", 0, 1, 0, devices)
    cluster = LAUNCHERS[launcher]
    try:
        processes, process, local = (
            cluster.get_process_count(),
            cluster.get_process_id(),
            cluster.get_local_process_id(),
        )
        if processes == 1:
            return Job("localhost", 0, 1, 0, devices)
        address = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
            timeout_secs=patience_s, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{launcher} does not say how to join the other processes: {error}; set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    if devices is None and local is not None:
        devices = share_of_node(os.environ, local)
    return Job(*_host_and_port(address), processes, process, devices)


def demand_nobody_else() -> None:
    """Raises ConfigError where a launcher has told of several processes, and not started this one as one of them.

    A bare `python` in an sbatch script has SLURM_NTASKS and no peers: it would train alone.
    """
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "localhost").split(",")
    counts = {name: os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")}
    counts["TPU_WORKER_HOSTNAMES"] = str(len(hosts))
    fixes = {"SLURM_NTASKS": "start it with srun", "OMPI_COMM_WORLD_SIZE": "start it with mpirun"}
    for name, count in counts.items():
        if count != "1":
            fix = fixes.get(name, "start it on a TPU")
            raise ConfigError(
                f"{name} tells of {count} processes, and this one cannot find the others: {fix}, or set "
                f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or unset {name} to use one process"
            )


def share_of_node(environment: Mapping[str, str], local: int) -> tuple[int, ...] | None:
    """The GPUs of the local-th process of this machine, None for all that it sees: one each, or equally many.

    JAX would give each process one GPU, a single process of a machine too.
    """
    here = processes_here(environment)
    if here == 1 or "SLURM_GPUS_PER_TASK" in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES")
    seen = len(visible.split(",")) if visible else 0
    if here is None or seen == 0 or seen % here:
        # One that sees one GPU of its own was given it by the launcher.
        return None if seen == 1 else (local,)
    each = seen // here
    return tuple(range(local * each, (local + 1) * each))


def processes_here(environment: Mapping[str, str]) -> int | None:
    """How many of the job's processes the launcher has started on this machine; None where it does not say."""
    if count := environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(count)
    # Such as 2(x3),1: two processes on each of three nodes, one on the fourth.
    each_node: list[int] = []
    for part in filter(None, environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        count, _, times = part.partition("(x")
        each_node += [int(count)] * int(times.rstrip(")") or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return each_node[node] if node < len(each_node) else None


def demand_port(port: int, patience_s: float = PORT_PATIENCE_S) -> None:
    """Raises CannotJoin where another program holds the port that process 0 has to listen on.

    gRPC would share it with another job of the same user, and mix up the two jobs' processes.
    """
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host = _host_and_port(bind)[0].strip("[]") if bind else ""
    deadline = time.monotonic() + patience_s
    while True:
        family = socket.AF_INET6 if (not host and socket.has_dualstack_ipv6()) or ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and not host:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise CannotJoin(
                        f"process 0 cannot listen on port {port}: {error.strerror}; another job, or another process 0, "
                        "is on this machine: choose another port in JAX_COORDINATOR_ADDRESS, or JAX_COORDINATOR_PORT"
                    ) from error
        time.sleep(0.5)


def connect(job: Job, heartbeat_s: int, patience_s: int) -> None:
    """jax.distributed.initialize, and word of what it waits for. Raises NobodyCame after patience_s.

    It waits in C++, and ends the process with a stack trace when it has waited enough: hence the thread.
    """
    failures: list[BaseException] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                job.address,
                job.processes,
                job.process,
                local_device_ids=job.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=patience_s + MARGIN_S,
                heartbeat_timeout_seconds=heartbeat_s,
            )
        except BaseException as error:  # noqa: BLE001  raised again below, where somebody hears of it
            failures.append(error)

    thread = threading.Thread(target=initialize, name="join", daemon=True)
    thread.start()
    began, next_word = time.monotonic(), FIRST_WORD_S
    # Process 0 gives up first, while it can still count those who came.
    limit_s = patience_s + (job.process > 0)
    while thread.is_alive():
        until = min(next_word, limit_s)
        thread.join(max(until - (time.monotonic() - began), 0.01))
        waited = time.monotonic() - began
        if not thread.is_alive() or waited < until:
            continue
        who, what = f"process {job.process} of {job.processes}", _obstacle(job)
        if waited >= limit_s:
            raise NobodyCame(f"{who} gave up after {waited:.0f} s: {what}")
        print(f"{who} waits: {what}, {waited:.0f} s", file=sys.stderr, flush=True)
        next_word = waited + WORD_EVERY_S
    if failures:
        raise failures[0]


def _obstacle(job: Job) -> str:
    """What is in the way. A name may be unknown for long where process 0's pod has not been placed yet."""
    if job.process == 0 and (here := _connections(job.port)):
        return f"{here} of them have come to {job.address}"
    try:
        socket.create_connection((job.host.strip("[]"), job.port), timeout=2).close()
    except socket.gaierror:
        return f"the name {job.host} of process 0's machine is not known here"
    except OSError as error:
        return f"process 0 does not answer at {job.address} ({error.strerror or error})"
    return f"process 0 answers at {job.address}, and waits for others"


def _connections(port: int) -> int:
    """How many processes are connected to that port of this machine; 0 where the kernel does not tell as Linux does."""
    established, here = "01", 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                here += state == established and int(local.rpartition(":")[2], 16) == port
    return here


def agree_on_number(job: Job) -> None:
    """Raises CannotJoin where processes were told of different numbers of them: their devices would never add up."""
    client = distributed.global_state.client
    assert client is not None
    mine, patience_ms = str(job.processes), 1000 * MARGIN_S
    client.key_value_set(f"llm_jax/processes/{job.process}", mine)
    others = range(1, job.processes) if job.process == 0 else (0,)
    for other in others:
        theirs = client.blocking_key_value_get(f"llm_jax/processes/{other}", patience_ms)
        if theirs != mine:
            raise CannotJoin(
                f"process {job.process} was told of {mine} processes, and process {other} of {theirs}: "
                "JAX_NUM_PROCESSES must be the same everywhere"
            )


def _restrict(devices: tuple[int, ...] | None) -> None:
    """What jax.distributed.initialize does about a process's GPUs; one process alone does not call it."""
    if devices is not None:
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", ",".join(map(str, devices)))


def _device_numbers() -> tuple[int, ...] | None:
    text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if not text:
        return None
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"JAX_LOCAL_DEVICE_IDS = {text!r}: must be numbers of GPUs, such as 0,1,2,3")
    return tuple(int(number) for number in numbers)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS = {address!r}: must be HOST:PORT, such as 10.0.0.1:8476")
    return host, int(port)


def _whole_number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r}: must be a whole number")
    return int(text)
