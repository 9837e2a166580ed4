"""What a launch is asked for, checked before anything queues: configs, overrides, and machines that fit them."""

import dataclasses
import difflib
import json
import math
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llm_jax import config
from llm_jax.config import ConfigError
from llm_jax.config_errors import show
from llm_jax.exit_codes import AGAIN, INTERRUPTED, MEANINGS, STALLED
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
    lines = []
    for path, run in zip(configs, runs, strict=True):
        try:
            check_fit(run, resources)
        except ConfigError as error:
            lines += [f"{path}: {line}" for line in error.lines]
    if lines:
        raise ConfigError(*lines)
    return Job(tuple(configs), tuple(overrides), runs)


def check_fit(run: Run, resources: Resources) -> None:
    """Raises ConfigError where the run's mesh is not made of exactly the devices that the resources come to.

    A single process may leave some unused, as when it is started by hand.
    """
    sizes = mesh_sizes(run.mesh, resources.n_devices)
    used = math.prod(sizes.values())
    if used < resources.n_devices and resources.n_processes > 1:
        raise ConfigError(f"the mesh uses {used} of {resources.n_devices} devices; with several processes it uses all")
    check_mesh(run, sizes)


class _Loader(yaml.SafeLoader):
    """YAML without its surprises: 24:00:00, a date, yes and no are text, and a key is text and stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises yaml.MarkedYAMLError, with the line, for a key that is no text or stands twice."""
        seen = set[str]()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                what = "a key has to be text, in quotes if YAML takes it for something else"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), ["t", "f"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^{_INT}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^{_INT}(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?$"), list("-+0123456789")
)


def read_resources(path: str, cls: type[R]) -> R:
    """What a launch file in YAML says. Raises ConfigError, with a line for each mistake."""
    try:
        said = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        text = json.dumps({} if said is None else said)
    except FileNotFoundError:
        close = difflib.get_close_matches(path, _beside(path), n=1)
        raise ConfigError(f"{path}: no such file{f'; did you mean {close[0]}?' if close else ''}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML that stands for JSON: {' '.join(str(error).split())}") from None
    if not isinstance(said, dict | None):
        raise ConfigError(f"{path}: says {show(said)}; it must say `field: value`, one field a line")
    try:
        return config.from_json(cls, text)
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {line}" for line in error.lines)) from None


def _beside(path: str) -> list[str]:
    return sorted(str(file) for pattern in ("*.yaml", "*.yml") for file in Path(path).parent.glob(pattern))


def as_exit_code(returncode: int) -> int:
    """The exit code as a shell says it: a death by signal n, which subprocess calls -n, is 128 + n."""
    return returncode if returncode >= 0 else 128 - returncode


def is_saved(exit_code: int) -> bool:
    """Whether the run was saved and is to be started again, as often as it takes."""
    return exit_code == AGAIN


def is_retried(exit_code: int) -> bool:
    """Whether a restart that counts against the limit may help: after a stall, or a death by a signal (128 + n)."""
    return exit_code == STALLED or (exit_code != INTERRUPTED and _signal(exit_code) > 0)


def tell(exit_code: int) -> str:
    """An exit code and what it means, such as "exit code 76 (no progress: restart)"."""
    number = _signal(exit_code)
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    killed = f"killed by {name}" if number else "not one of llm-jax's"
    return f"exit code {exit_code} ({MEANINGS.get(exit_code, killed)})"


def _signal(exit_code: int) -> int:
    """The number of the signal that an exit code tells of, or 0."""
    return exit_code - 128 if 128 < exit_code < 128 + signal.NSIG else 0
