"""A job as a Kubernetes JobSet."""

from llm_jax.launch.config import JobSetResources
from llm_jax.launch.job import Job


def render(job: Job, resources: JobSetResources) -> str:
    """The manifest, in YAML."""
    raise NotImplementedError


def submit(manifest: str) -> int:
    """Gives the manifest to kubectl; returns the exit code."""
    raise NotImplementedError
