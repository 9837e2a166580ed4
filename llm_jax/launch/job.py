"""What a launch is asked for, checked before anything queues: configs, overrides, and machines that fit them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from llm_jax import config
from llm_jax.alphabet import MESH_AXES
from llm_jax.config import ConfigError
from llm_jax.exit_codes import AGAIN, STALLED
from llm_jax.launch.config import JobSetResources, LocalResources, Resources, SlurmResources
from llm_jax.run import Run, check_mesh, from_command_line, mesh_sizes

R = TypeVar("R", LocalResources, SlurmResources, JobSetResources)


@dataclasses.dataclass(frozen=True)
class Job:
    """One config, or several that become an array; what was typed, and the run that each config describes."""

    configs: tuple[str, ...]
    overrides: tuple[str, ...]
    runs: tuple[Run, ...]

    def command(self, index: int) -> list[str]:
        """The arguments of llm-jax that train the config of that index."""
        return ["train", self.configs[index], *self.overrides]


def read_job(configs: Sequence[str], overrides: Sequence[str], resources: Resources) -> Job:
    """The job, every run of it checked against the devices. Raises ConfigError, with a line for each mistake."""
    runs = tuple(from_command_line(path, overrides) for path in configs)
    directories = [run.run_dir for run in runs]
    for path, directory in zip(configs, directories, strict=True):
        if directories.count(directory) > 1:
            raise ConfigError(f"{path}: run_dir = {directory} is another config's too; each run needs its own")
    for run in runs:
        check_fit(run, resources)
    return Job(tuple(configs), tuple(overrides), runs)


def check_fit(run: Run, resources: Resources) -> None:
    """Raises ConfigError where the run's mesh is not made of exactly the devices that the resources come to."""
    sizes = mesh_sizes(run.mesh, resources.n_devices)
    used = 1
    for axis in MESH_AXES:
        used *= sizes[axis]
    if used < resources.n_devices and resources.n_processes > 1:
        raise ConfigError(
            f"{run.name}: the mesh uses {used} of {resources.n_devices} devices; with several processes it uses all"
        )
    check_mesh(run, sizes)


def read_resources(path: str, cls: type[R]) -> R:
    """What a launch file in YAML says. Raises ConfigError, with a line for each mistake."""
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        text = json.dumps({} if said is None else said)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{path}: is not YAML that stands for JSON: {told}") from None
    try:
        return config.from_json(cls, text)
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {line}" for line in error.lines)) from None


def is_retried(exit_code: int) -> bool:
    """Whether a restart that counts against the limit may help: after a stall, or a death by signal (128 + n, or -n)."""
    return exit_code == STALLED or (exit_code > 128 and exit_code != 130) or exit_code < 0


def is_saved(exit_code: int) -> bool:
    """Whether the run was saved and is to be started again, as often as it takes."""
    return exit_code == AGAIN
