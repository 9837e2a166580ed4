"""What a launch file may say: the machines that a job runs on, and how it is to be restarted."""

from typing import Annotated

from annotated_types import Ge, Gt, MinLen
from pydantic import Field

from llm_jax.config import Config

Name = Annotated[str, MinLen(1)]
Count = Annotated[int, Ge(1)]


class LocalResources(Config):
    """Processes on this machine, each with emulated CPU devices: a rehearsal of a large job."""

    processes: Count = 2
    """How many processes."""
    devices: Count = 4
    """Emulated CPU devices of each process."""
    restarts: Annotated[int, Ge(0)] = 3
    """Restarts after a stall (76) or a death by signal; those after 75 are not counted."""
    grace_seconds: Annotated[float, Gt(0)] = 10.0
    """After the first failure the other processes get SIGTERM, and so many seconds later SIGKILL."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every process."""

    @property
    def n_processes(self) -> int:
        """Processes of the job."""
        return self.processes

    @property
    def n_devices(self) -> int:
        """Devices of the job."""
        return self.processes * self.devices


class SlurmResources(Config):
    """Nodes of a Slurm cluster."""

    nodes: Count = 1
    """Nodes of the job."""
    tasks_per_node: Count = 1
    """Processes of a node: one a GPU, or one a node."""
    devices_per_task: Count = 1
    """Devices that each process sees."""
    time: Annotated[str, MinLen(1)] | None = None
    """Time limit as Slurm writes it, such as "24:00:00"; null is the partition's."""
    partition: Name | None = None
    """Partition; null is the cluster's default."""
    account: Name | None = None
    """Account that is charged."""
    gpus_per_node: Annotated[int, Ge(0)] = 0
    """GPUs asked for on each node; 0 asks for none."""
    cpus_per_task: Count | None = None
    """Cores of each process; null is Slurm's choice."""
    exclusive: bool = False
    """Whether nobody else may use the nodes."""
    options: tuple[Name, ...] = ()
    """More lines for #SBATCH, such as "--constraint=h100"."""
    signal_seconds: Count = 180
    """SIGTERM comes so long before the time limit: a step and a save have to fit; Slurm may send it a minute early."""
    restarts: Annotated[int, Ge(0)] = 3
    """Requeues after a stall (76) or a death by signal; those after 75 are not counted."""
    array_limit: Count | None = None
    """Of several configs (a job array), so many run at a time; null is all."""
    coordinator_port: Annotated[int, Ge(1024)] | None = None
    """Port of process 0; null is JAX's, which follows from the job's number."""
    log_dir: Name = "logs"
    """Where the logs go."""
    setup: tuple[str, ...] = ()
    """Shell lines before the program, such as "source .venv/bin/activate"."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every process."""

    @property
    def n_processes(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks_per_node

    @property
    def n_devices(self) -> int:
        """Devices of the job."""
        return self.n_processes * self.devices_per_task


class JobSetResources(Config):
    """Pods of a Kubernetes cluster with JobSet, and Kueue where a queue is named."""

    image: Name
    """Container image, with llm_jax installed."""
    slices: Count = 1
    """TPU slices, or groups of nodes with a fast network: one Job of the set each."""
    hosts: Count = 1
    """Pods of a slice, one a host and one process each."""
    devices_per_host: Count = 1
    """Devices that each process sees."""
    accelerator: Name | None = None
    """Kubernetes resource that the devices are, such as google.com/tpu or nvidia.com/gpu; null asks for none."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes, such as cloud.google.com/gke-tpu-topology: 4x4x4."""
    topology: Name | None = None
    """Label of the nodes that a slice shares and no other slice has, such as cloud.google.com/gke-nodepool; null leaves
    slices to the scheduler."""
    host_network: bool = False
    """Whether pods use their host's network directly: faster between slices."""
    cpu: Name | None = None
    """Cores that a pod asks for, such as "24"."""
    memory: Name | None = None
    """Memory that a pod asks for, such as 200Gi."""
    namespace: Name | None = None
    """Namespace; null is kubectl's."""
    queue: Name | None = None
    """Kueue's local queue; null leaves Kueue out."""
    priority_class: Name | None = None
    """PriorityClass of the pods."""
    service_account: Name | None = None
    """Service account of the pods, for buckets."""
    claims: dict[str, str] = Field(default_factory=dict)
    """PersistentVolumeClaims by the path where they are mounted: run_dir and data.dir belong on one that all share."""
    working_dir: Name = "/llm_jax"
    """Where the program starts in the image: relative paths of configs, runs and data start there."""
    grace_seconds: Count = 300
    """From SIGTERM to SIGKILL: a step and a save have to fit."""
    restarts: Annotated[int, Ge(0)] = 3
    """Restarts after a stall (76) or a death by signal; those after 75 and a disruption are not counted."""
    coordinator_port: Annotated[int, Ge(1024)] = 8482
    """Port of process 0. TPUs talk to each other on 8476."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every process."""

    @property
    def n_processes(self) -> int:
        """Processes of the job."""
        return self.slices * self.hosts

    @property
    def n_devices(self) -> int:
        """Devices of the job."""
        return self.n_processes * self.devices_per_host


Resources = LocalResources | SlurmResources | JobSetResources
