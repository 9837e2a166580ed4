"""A job's processes on this machine, as a cluster would run them."""

from llm_jax.launch.config import LocalResources
from llm_jax.launch.job import Job


def render(job: Job, resources: LocalResources) -> str:
    """The shell commands that the processes would be started with."""
    raise NotImplementedError


def run(job: Job, resources: LocalResources) -> int:
    """Runs the job to its end, restarts included; returns its exit code."""
    raise NotImplementedError
