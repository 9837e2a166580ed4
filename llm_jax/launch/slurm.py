"""A job as an sbatch script."""

from llm_jax.launch.config import SlurmResources
from llm_jax.launch.job import Job


def render(job: Job, resources: SlurmResources) -> str:
    """The script; several configs make a job array."""
    raise NotImplementedError


def submit(script: str, resources: SlurmResources) -> int:
    """Gives the script to sbatch; returns the exit code."""
    raise NotImplementedError
