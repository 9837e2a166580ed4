"""A real Slurm on this machine: its own daemons on free ports, in a temporary folder, gone when the tests are.

Nodes are named after loopback addresses, so that JAX, which takes the first node's name for the coordinator's, finds it
without a line in /etc/hosts. Of two partitions, jobs in `high` drive those in `low` away, which are then requeued.
There is no accounting database: what became of a job is asked of slurmctld, which remembers it for five minutes.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import QUICKLY_COMPILED, ROOT, STRICT

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
KILL_WAIT_S = 10
GRACE_S = 60

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
Epilog={folder}/epilog
KillWait={kill_wait}
SlurmctldTimeout=30
SlurmdTimeout=30
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs=4 RealMemory=4096\n"
PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


class Job(NamedTuple):
    """What slurmctld says of a job; a death by signal n is exit code 128 + n."""

    state: str
    restarts: int
    exit_code: int


class Slurm:
    """The cluster: two nodes of four cores each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes = ("127.0.0.1", "127.0.0.2")
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        conf = str(folder / "slurm.conf")
        # Jobs inherit what sbatch is given: this interpreter, the program, and few threads, on one device each.
        kept = {name: value for name, value in os.environ.items() if name not in (*STRICT, "PYTHONDONTWRITEBYTECODE")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        kept |= {"PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICKLY_COMPILED, "JAX_NUM_CPU_DEVICES": "1"}
        self.env = kept | {"SLURM_CONF": conf}

    def start(self) -> None:
        """Starts the daemons; returns when every node is idle."""
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(1 + len(self.nodes))
        values = {"host": host, "user": getpass.getuser(), "folder": self.folder, "kill_wait": KILL_WAIT_S}
        # JAX derives its port from the job's number: two labs at a time must not count alike.
        conf = CONF.format(port=ports[0], first_job=10_000 + ports[0] % 4000, **values)
        for name, port in zip(self.nodes, ports[1:], strict=True):
            conf += NODE.format(name=name, host=host, port=port)
        for name in ("munge", "state", "log", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(mode=0o700)
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o600)
        # A node refuses a job that is started again within the second in which it was ended: that has to be over first.
        (self.folder / "epilog").write_text("#!/bin/sh\nsleep 1.1\n")
        (self.folder / "epilog").chmod(0o700)
        (self.folder / "slurm.conf").write_text(conf + PARTITIONS.format(grace=GRACE_S))
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.wait(lambda: (munge / "socket").exists(), 20)
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: self.idle() == len(self.nodes), 60)

    def start_node(self, node: str) -> None:
        """Starts a node's daemon."""
        self._daemon("slurmd", "-D", "-N", node)

    def _daemon(self, program: str, *arguments: str) -> None:
        name = " ".join([program, *(argument for argument in arguments if argument in self.nodes)])
        # Where the tests are killed, nobody is left to call stop: then the kernel ends the daemons.
        command = ["setpriv", "--pdeathsig=KILL", program, *arguments]
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def stop(self) -> None:
        """Ends jobs and daemons, whatever state they are in."""
        if "slurmctld" in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=self.env, timeout=10, check=False)
        for daemon in self.daemons.values():
            daemon.kill()
        # What the nodes have started is in sessions of its own, and knows the cluster's configuration.
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.wait()

    def processes(self, *wanted: str) -> list[int]:
        """The processes that were started with this cluster's configuration and all of the wanted NAME=value."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                    if {f"SLURM_CONF={self.env['SLURM_CONF']}", *wanted} <= set(variables):
                        found.append(int(folder.name))
        return found

    def run(self, *command: str, check: bool = True) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def lose(self, node: str) -> list[int]:
        """Everything of a node falls silent at once; returns the processes, which are there for the caller to end."""
        slurmd = self.daemons.pop(f"slurmd {node}")
        slurmd.kill()
        slurmd.wait()
        tasks = self.processes(f"SLURMD_NODENAME={node}")
        ours = set(self.processes())
        # A task's first process was started by the node's own.
        frozen = [*({parent(pid) for pid in tasks} & ours - set(tasks)), *tasks]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        return frozen

    def idle(self) -> int:
        """How many nodes wait for work."""
        return len(set(self.run("sinfo", "-hN", "-tidle", "-o%N", check=False).split()))

    def job(self, number: str) -> Job:
        """What is said of a job, or of element 12_0 of an array."""
        said = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        told = dict(re.findall(r"(\w+)=(\S*)", said))
        status, signalled = map(int, told["ExitCode"].split(":"))
        return Job(told["JobState"], int(told["Restarts"]), 128 + signalled if signalled else status)

    def start_now(self, number: str) -> None:
        """Spares a requeued job the two minutes that Slurm lets it wait."""
        self.run("scontrol", "update", f"jobid={number}", "StartTime=now")

    def wait(self, condition: Callable[[], bool], timeout: float, what: str = "the nodes") -> None:
        """Waits until the condition holds; fails after timeout seconds, with what the daemons said."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                logs = {path.name: path.read_text(errors="replace")[-1500:] for path in (self.folder / "log").iterdir()}
                pytest.fail(f"waited {timeout} s for {what}\n" + "\n".join(f"-- {k}\n{v}" for k, v in logs.items()))
            time.sleep(0.1)

    def wait_for_state(self, number: str, *states: str, timeout: float = 300) -> Job:
        """Waits until a job is in one of the states."""
        self.wait(lambda: self.job(number).state in states, timeout, f"job {number} to be {' or '.join(states)}")
        return self.job(number)


@contextlib.contextmanager
def running_slurm() -> Iterator[Slurm]:
    """A cluster for as long as the context lasts; the test is skipped where Slurm is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge")
    # Short, since a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        slurm = Slurm(Path(folder))
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


def parent(pid: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def free_ports(n: int) -> list[int]:
    """Different TCP ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
