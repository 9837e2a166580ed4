"""`llm-jax launch slurm|jobset|local`: the same training command, on many machines. Imports no jax."""

import sys
from collections.abc import Sequence

from llm_jax import exit_codes
from llm_jax.command_line import Parser
from llm_jax.launch import jobset, local, slurm
from llm_jax.launch.config import JobSetResources, LocalResources, SlurmResources
from llm_jax.launch.job import read_job, read_resources

_DESCRIPTION = """\
Turn a config and a file of resources into a job: an sbatch script, a Kubernetes JobSet, or processes on this machine.
It is printed; --submit submits it (sbatch, kubectl create) or, for local, runs it. The mesh is checked against the
devices before anything queues. A job that exits with 75 (saved) is started again without limit, after a stall (76) or
a death by signal up to `restarts` times, and after anything else never."""

_EXAMPLES = """\
  llm-jax launch local configs/tiny_causal.py --resources launch/local.yaml --submit
  llm-jax launch slurm configs/llama3_8b.py --resources launch/slurm_gpu.yaml > job.sh
  llm-jax launch slurm configs/tiny_causal.py configs/tiny_moe.py --resources launch/slurm_cpu.yaml --submit   an array
  llm-jax launch jobset configs/llama3_8b.py --resources launch/jobset_tpu.yaml --submit"""


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code. Raises Failure for what is foreseen."""
    parser = Parser("launch", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("kind", choices=("slurm", "jobset", "local"), help="where the job runs")
    parser.add_argument("configs", nargs="+", metavar="config", help="a config file; several make a Slurm array")
    parser.add_argument("--resources", required=True, metavar="FILE", help="a YAML file such as launch/local.yaml")
    parser.add_argument("--submit", action="store_true", help="submit or run the job, instead of printing it")
    arguments = parser.read(argv)
    configs = [word for word in arguments.configs if "=" not in word]
    overrides = [word for word in arguments.configs if "=" in word]
    if not configs:
        parser.error("no config file")
    if arguments.kind != "slurm" and len(configs) > 1:
        parser.error(f"{arguments.kind} takes one config; several make an array, which only slurm has")
    match arguments.kind:
        case "local":
            resources = read_resources(arguments.resources, LocalResources)
            job = read_job(configs, overrides, resources)
            if arguments.submit:
                return local.run(job, resources)
            text = local.render(job, resources)
        case "slurm":
            resources = read_resources(arguments.resources, SlurmResources)
            text = slurm.render(read_job(configs, overrides, resources), resources)
            if arguments.submit:
                return slurm.submit(text, resources)
        case _:
            resources = read_resources(arguments.resources, JobSetResources)
            text = jobset.render(read_job(configs, overrides, resources), resources)
            if arguments.submit:
                return jobset.submit(text)
    sys.stdout.write(text)
    return exit_codes.DONE
