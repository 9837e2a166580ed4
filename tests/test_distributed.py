"""How processes find each other: what the environment says, what is refused in a line, and who waits for whom."""

import functools
import os
import signal
import socket
import time

import pytest

from llm_jax.config import ConfigError
from llm_jax.distributed import CannotJoin, Job, demand_port, processes_here, read_job, share_of_node
from tests.conftest import ROOT, Cli, LaunchProcesses, Running, Start, free_port, listens
from tests.training import wait_for

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FOREIGN = ("JAX_", "SLURM_", "OMPI_", "TPU_", "CUDA_", "ROCR_")

# Joins with patience for SECONDS, then says how many there are and which GPUs are its own.
JOIN = """
import sys
from llm_jax import distributed, processes
from llm_jax.exit_codes import Failure
distributed.FIRST_WORD_S = 0.5
try:
    distributed.join_processes(heartbeat_s=int(sys.argv[2]), patience_s=int(sys.argv[1]))
except Failure as failure:
    print(failure, file=sys.stderr, flush=True)
    import os
    processes.leave_in_order()
    os._exit(failure.exit_code)
import jax
print(jax.process_index(), "of", jax.process_count(), jax.config.values["jax_cuda_visible_devices"], flush=True)
"""
LEAVE = "jax.distributed.shutdown()"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables but a test's own."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    return monkeypatch


def triple(port: int, processes: int, process: int) -> dict[str, str]:
    return dict(zip(NAMES, (f"127.0.0.1:{port}", str(processes), str(process)), strict=True))


def slurm(processes: int, process: int, local: int, tasks: str) -> dict[str, str]:
    """What srun sets for one of a step's tasks on this machine."""
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
    }


def open_mpi(processes: int, process: int) -> dict[str, str]:
    """What mpirun of Open MPI 4 sets."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(processes),
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(processes),
    }


@pytest.mark.parametrize(
    ("said", "job"),
    [
        ({}, Job("localhost", 0, 1, 0, None)),
        ({"JAX_LOCAL_DEVICE_IDS": "2,3"}, Job("localhost", 0, 1, 0, (2, 3))),
        (triple(1234, 4, 3), Job("127.0.0.1", 1234, 4, 3, None)),
        # Under a launcher too the three variables decide, and no GPU is taken away.
        (slurm(2, 1, 1, "2") | triple(1234, 4, 3), Job("127.0.0.1", 1234, 4, 3, None)),
        (triple(1234, 4, 3) | {"JAX_LOCAL_DEVICE_IDS": "1"}, Job("127.0.0.1", 1234, 4, 3, (1,))),
        (triple(1, 2, 0) | {NAMES[0]: "[::1]:8476"}, Job("[::1]", 8476, 2, 0, None)),
        (slurm(2, 1, 1, "2"), Job("127.0.0.1", 61457, 2, 1, (1,))),
        (slurm(2, 1, 0, "1(x2)"), Job("127.0.0.1", 61457, 2, 1, None)),
        (slurm(2, 1, 0, "1(x2)") | {NAMES[0]: "10.0.0.7:99"}, Job("10.0.0.7", 99, 2, 1, None)),
        (slurm(2, 1, 0, "1(x2)") | {"JAX_COORDINATOR_PORT": "99"}, Job("127.0.0.1", 99, 2, 1, None)),
        (slurm(2, 1, 0, "1(x2)") | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Job("127.0.0.1", 61457, 2, 1, (0, 1))),
        (slurm(1, 0, 0, "1"), Job("localhost", 0, 1, 0, None)),
        (open_mpi(2, 1), Job("127.0.0.1", 62624, 2, 1, (1,))),
    ],
)
def test_what_the_environment_says(environment: pytest.MonkeyPatch, said: dict[str, str], job: Job) -> None:
    for name, value in said.items():
        environment.setenv(name, value)
    assert read_job(patience_s=1) == job


OTHERS = "and this one cannot find the others"
FIX = "or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or unset"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set; several processes need all of"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID not set; several processes need all"),
        (triple(1, 2, 2), "JAX_PROCESS_ID = 2: must be less than JAX_NUM_PROCESSES = 2"),
        (triple(1, 2, 0) | {NAMES[1]: "two"}, "JAX_NUM_PROCESSES = 'two': must be a whole number"),
        (triple(1, 2, 0) | {NAMES[2]: "-1"}, "JAX_PROCESS_ID = '-1': must be a whole number"),
        (triple(1, 2, 0) | {NAMES[0]: "here"}, "JAX_COORDINATOR_ADDRESS = 'here': must be HOST:PORT, such as"),
        (triple(1, 2, 0) | {NAMES[0]: "here:70000"}, "JAX_COORDINATOR_ADDRESS = 'here:70000': must be HOST:PORT"),
        ({"JAX_LOCAL_DEVICE_IDS": "all"}, "JAX_LOCAL_DEVICE_IDS = 'all': must be numbers of GPUs, such as 0,1,2,3"),
        # A bare `python` in an sbatch script; and without the variables of a step, srun is not seen either.
        ({"SLURM_NTASKS": "2"}, f"SLURM_NTASKS tells of 2 processes, {OTHERS}: start it with srun, {FIX} SLURM_NTASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_SIZE tells of 3 processes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES tells of 2 processes"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(environment: pytest.MonkeyPatch, said: dict[str, str], message: str) -> None:
    for name, value in said.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        read_job(patience_s=1)
    # Open MPI 5 says no more than this, and newer versions of JAX want mpi4py for it.
    wants_mpi = "OMPI_COMM_WORLD_SIZE" in said and "mpi4py" in str(error.value)
    assert str(error.value).startswith(message) or wants_mpi


@pytest.mark.parametrize(
    ("said", "local", "share"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, 0, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 5, (5,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 1, (4, 5, 6, 7)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2(x3)", "SLURM_NODEID": "3", "ROCR_VISIBLE_DEVICES": "0,1"}, 1, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2(x3)", "SLURM_NODEID": "0", "ROCR_VISIBLE_DEVICES": "0,1"}, 0, None),
        # With --gpus-per-task a task sees its own and no other's.
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, 3, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "2,3"}, 1, None),
        # Nothing known: JAX's rule, a GPU each.
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, 3, (3,)),
        ({}, 3, (3,)),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 0, None),
    ],
)
def test_gpus_of_a_process(said: dict[str, str], local: int, share: tuple[int, ...] | None) -> None:
    assert share_of_node(said, local) == share


def test_tasks_of_a_node() -> None:
    told = [processes_here({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": str(node)}) for node in range(5)]
    assert told == [2, 2, 2, 1, None]


@pytest.mark.parametrize("shared", [False, True])
def test_a_taken_port_is_refused(environment: pytest.MonkeyPatch, shared: bool) -> None:
    """Also one whose holder would share it, as gRPC does."""
    with socket.socket() as holder:
        if shared:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(CannotJoin, match=f"cannot listen on port {port}: Address already in use"):
            demand_port(port, patience_s=0)
        environment.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(CannotJoin):
            demand_port(port, patience_s=0)
    demand_port(port, patience_s=0)


def test_the_last_life_may_hold_the_port_for_a_while(environment: pytest.MonkeyPatch, start: Start) -> None:
    port = free_port()
    program = f"import socket, time; s = socket.socket(); s.bind(('', {port})); s.listen(); time.sleep(2)"
    holder = start("-c", program)
    wait_for(functools.partial(listens, port), holder)
    demand_port(port)
    assert holder.wait(60).returncode == 0


def test_two_find_each_other_past_a_proxy(launch_processes: LaunchProcesses) -> None:
    """By the three variables; each takes the GPUs that it is told to."""
    env = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "JAX_LOCAL_DEVICE_IDS": "2,3"}
    results = launch_processes(2, 1, ["-c", JOIN + LEAVE, "60", "60"], env=env, timeout=90)
    for process, result in enumerate(results):
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{process} of 2 2,3\n"
        assert "proxy" not in result.stderr


@pytest.mark.parametrize("launcher", ["slurm", pytest.param("open_mpi", marks=pytest.mark.slow)])
def test_two_find_each_other_by_a_launcher(start: Start, launcher: str) -> None:
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    said = [slurm(2, i, 0, "1(x2)") if launcher == "slurm" else open_mpi(2, i) for i in range(2)]
    both = [start("-c", JOIN + LEAVE, "60", "60", env=port | said[i]) for i in range(2)]
    for process, running in enumerate(both):
        result = running.wait(90)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{process} of 2 {'all' if launcher == 'slurm' else process}\n"


def refused(running: Running, code: int, *words: str) -> None:
    """Held to its exit code, and to saying why in its last line."""
    result = running.wait(90)
    assert result.returncode == code, result.stderr
    last = result.stderr.splitlines()[-1]
    assert all(word in last for word in words), result.stderr


def test_different_numbers_are_told_on_both_sides(start: Start) -> None:
    port = free_port()
    both = [start("-c", JOIN, "60", "60", env=triple(port, 2 + i, i)) for i in range(2)]
    refused(both[0], 3, "process 0 was told of 2 processes, and process 1 of 3: JAX_NUM_PROCESSES must be the same")
    refused(both[1], 3, "process 1 was told of 3 processes, and process 0 of 2: JAX_NUM_PROCESSES must be the same")


# `llm-jax` of one of two processes, whose verb joins the other and then refuses, SECONDS later on this one.
REFUSES = """
import sys, time
from llm_jax import __main__ as program, distributed
from llm_jax.exit_codes import Failure
def verb(argv):
    distributed.join_processes(heartbeat_s=60, patience_s=60)
    time.sleep(float(argv[1]))
    failure = Failure(f"refused after {argv[1]} s")
    failure.exit_code = 65
    raise failure
program.run_verb = verb
sys.exit(program.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("seconds", [("0", "3"), ("3", "0")])
def test_refusing_one_after_the_other_each_ends_with_its_own_line_and_code(
    start: Start, seconds: tuple[str, str]
) -> None:
    """Process 0 hosts the coordination service: ended at once, it would take process 1 along with SIGABRT."""
    port = free_port()
    both = [start("-c", REFUSES, seconds[i], env=triple(port, 2, i)) for i in range(2)]
    for i, running in enumerate(both):
        refused(running, 65, f"refused after {seconds[i]} s")
        assert running.done().stderr.count("\n") == 1


def test_nobody_at_that_address(start: Start) -> None:
    running = start("-c", JOIN, "2", "60", env=triple(free_port(), 2, 1))
    refused(running, 76, "process 1 of 2 gave up after 3 s: process 0 does not answer at 127.0.0.1:", "refused")
    assert "process 1 of 2 waits: process 0 does not answer" in running.done().stderr


@pytest.mark.slow
def test_one_of_three_does_not_come(start: Start) -> None:
    port = free_port()
    both = [start("-c", JOIN, "8", "60", env=triple(port, 3, i)) for i in range(2)]
    refused(both[0], 76, f"process 0 of 3 gave up after 8 s: 2 of them have come to 127.0.0.1:{port}")
    refused(both[1], 76, "process 1 of 3 gave up")


@pytest.mark.slow
def test_a_name_that_nobody_knows(start: Start) -> None:
    env = triple(1, 2, 1) | {NAMES[0]: "no-such-host.invalid:1234"}
    running = start("-c", JOIN, "2", "60", env=env)
    refused(running, 76, "the name no-such-host.invalid of process 0's machine is not known here")


@pytest.mark.slow
def test_a_second_process_0_is_refused(start: Start) -> None:
    """And the first one's job goes on: gRPC alone would have mixed them up."""
    port = free_port()
    first = start("-c", JOIN + LEAVE, "60", "60", env=triple(port, 2, 0))
    wait_for(functools.partial(listens, port), first)
    refused(start("-c", JOIN, "60", "60", env=triple(port, 2, 0)), 3, f"process 0 cannot listen on port {port}")
    last = start("-c", JOIN + LEAVE, "60", "60", env=triple(port, 2, 1))
    assert first.wait(90).returncode == last.wait(90).returncode == 0


@pytest.mark.parametrize(("devices", "orders"), [(1, False), (2, True)])
def test_emulated_devices_begin_collectives_in_one_order(start: Start, devices: int, orders: bool) -> None:
    """What that prevents is held by test_collectives_of_two_axes_do_not_wait_for_each_other and this suite's flags."""
    env = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    done = start("-c", JOIN + "import os; print(os.environ['XLA_FLAGS'])", "60", "60", devices=devices, env=env).wait()
    added = " --xla_cpu_enable_concurrency_optimized_scheduler=false" if orders else ""
    assert done.stdout.splitlines()[-1] == env["XLA_FLAGS"] + added, done


@pytest.mark.slow
def test_the_heartbeat_is_the_configs(start: Start) -> None:
    """A process that dies without a word ends the job after the seconds that were asked for, not JAX's 100."""
    port = free_port()
    living = start("-c", JOIN + "import time; time.sleep(300)", "60", "5", env=triple(port, 2, 0))
    dying = start(
        "-c", JOIN + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "60", "5", env=triple(port, 2, 1)
    )
    assert dying.wait(60).returncode == -signal.SIGKILL
    begun = time.monotonic()
    assert living.wait(60).returncode == -signal.SIGABRT
    assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_verbs_say_it_in_a_line(cli: Cli) -> None:
    for verb in (["train", "configs/tiny_causal.py"], ["eval", "runs/none"]):
        done = cli(*verb, env={"SLURM_NTASKS": "2"}, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("SLURM_NTASKS tells of 2 processes")
