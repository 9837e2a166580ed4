"""A job as an sbatch script: srun starts the processes, and the script has the job requeued where that helps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from llm_jax import exit_codes
from llm_jax.config import ConfigError
from llm_jax.launch.config import SlurmResources
from llm_jax.launch.job import Job


class NotSubmitted(exit_codes.Failure):
    """sbatch is missing, or did not take the script."""

    exit_code = exit_codes.NO


def render(job: Job, resources: SlurmResources) -> str:
    """The script; several configs make a job array. Raises ConfigError where the resources contradict themselves."""
    _check(resources)
    configs = len(job.configs)
    name = re.sub(r"[^\w.+-]+", "-", job.runs[0].name) + (f"-and-{configs - 1}-more" if configs > 1 else "")
    parts = (
        _request(name, configs, resources),
        _attempt(name, configs, resources),
        _surroundings(configs, resources),
        _choice(job),
        _task(resources),
        _step(resources),
        _ending(resources),
    )
    return "\n".join(line for part in parts for line in (*part, ""))


def submit(script: str, resources: SlurmResources) -> int:
    """Gives the script to sbatch; returns the exit code. Raises NotSubmitted, with what sbatch said."""
    try:
        Path(resources.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotSubmitted(f"log_dir = {resources.log_dir}: cannot be made: {error.strerror}") from None
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotSubmitted(f"sbatch: {error.strerror}; --submit is for a machine with Slurm's commands") from None
    if done.returncode:
        raise NotSubmitted(" ".join(f"sbatch did not take the job: {done.stderr}".split()))
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return exit_codes.DONE


def _check(resources: SlurmResources) -> None:
    lines = [f"environment: {name!r} is no variable's name" for name in resources.environment if not _is_name(name)]
    lines += [f"options: {o!r} must begin with a dash, and be one line" for o in resources.options if not _is_option(o)]
    devices = resources.tasks_per_node * resources.devices_per_task
    if resources.gpus_per_node not in (0, devices):
        lines.append(
            f"gpus_per_node = {resources.gpus_per_node}, but tasks_per_node x devices_per_task = "
            f"{resources.tasks_per_node} x {resources.devices_per_task}; every GPU that is asked for is used"
        )
    if lines:
        raise ConfigError(*lines)


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII) is not None


def _is_option(text: str) -> bool:
    return text.startswith("-") and text.isprintable()


def _request(name: str, configs: int, resources: SlurmResources) -> list[str]:
    """What sbatch reads."""
    limit = "" if resources.array_limit is None else f"%{resources.array_limit}"
    asked = {
        "job-name": name,
        "array": f"0-{configs - 1}{limit}" if configs > 1 else None,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.tasks_per_node,
        "cpus-per-task": resources.cpus_per_task,
        "gpus-per-node": resources.gpus_per_node or None,
        "time": resources.time,
        "partition": resources.partition,
        "account": resources.account,
    }
    log = f"{resources.log_dir.replace('%', '%%')}/{name}-{'%A_%a' if configs > 1 else '%j'}.out"
    return [
        "#!/bin/bash",
        *(f"#SBATCH --{option}={shlex.quote(str(value))}" for option, value in asked.items() if value is not None),
        *(["#SBATCH --exclusive"] if resources.exclusive else []),
        *(f"#SBATCH {option}" for option in resources.options),
        f"# The folder has to be there before the job starts: mkdir -p {shlex.quote(resources.log_dir)}",
        f"#SBATCH --output={shlex.quote(log)}",
        "# All attempts write the same log, one after the other.",
        "#SBATCH --open-mode=append",
        "# After preemption and the loss of a node Slurm starts the job again, and the run goes on from its last save.",
        "#SBATCH --requeue",
        "# So many seconds before the time limit, or a minute earlier, the processes get SIGTERM and save,",
        "# with exit code 75. With B: it would go to this script instead.",
        f"#SBATCH --signal=TERM@{resources.signal_seconds}",
    ]


def _attempt(name: str, configs: int, resources: SlurmResources) -> list[str]:
    """Where the script keeps what it has to know of this attempt and those before."""
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if configs > 1 else "$SLURM_JOB_ID"
    here = "" if resources.log_dir.startswith("/") else '"$PWD"/'
    return [
        f"job={number}",
        "# Beside the log: how often the job was restarted, and for each attempt how its processes ended.",
        f"record={here}{shlex.quote(f'{resources.log_dir}/{name}')}-$job",
        "attempt=${SLURM_RESTART_COUNT:-0}",
        '((attempt > 0)) || rm -rf "$record"',
        'export notes="$record/attempt-$attempt"',
        'mkdir -p "$notes" || exit 74',
        'echo "job $job, attempt $attempt, on $SLURM_JOB_NODELIST"',
    ]


def _surroundings(configs: int, resources: SlurmResources) -> list[str]:
    """Set-up and environment."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in resources.environment.items()]
    if resources.coordinator_port is not None:
        port = f"{resources.coordinator_port}"
        if configs > 1:
            lines.append("# Elements of an array may share their first node.")
            port = f"$(({port} + SLURM_ARRAY_TASK_ID))"
        lines.append(f"export JAX_COORDINATOR_PORT={port}")
    if resources.setup:
        return ["# A set-up that fails ends the job.", "set -e", *resources.setup, "set +e", *lines]
    return lines


def _choice(job: Job) -> list[str]:
    """What to train."""
    runs = [shlex.join(job.command(index)) for index in range(len(job.configs))]
    if len(runs) == 1:
        return [f"run=({runs[0]})"]
    cases = [f"  {index}) run=({run}) ;;" for index, run in enumerate(runs)]
    return ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]


def _task(resources: SlurmResources) -> list[str]:
    """What each process runs: the program, and a note of its end."""
    n = resources.devices_per_task
    devices = (
        "  # Of itself JAX gives a process under Slurm one device, that of its number on the node.",
        f"  local first=$((SLURM_LOCALID * {n}))",
        f"  JAX_LOCAL_DEVICE_IDS=$(seq -s, $first $((first + {n - 1})))",
        "  export JAX_LOCAL_DEVICE_IDS",
    )
    return [
        "# What srun runs for each process. When one fails, srun ends the others, which then fail too, and tells only",
        "# the highest exit code. So each process notes its own, after a number: the lowest is the cause.",
        "task() {",
        *(devices if n > 1 else ()),
        "  # The program gets SIGTERM too, and saves; this shell stays, to note what came of that.",
        "  local asked=0 order=40",
        "  trap 'asked=50' TERM",
        '  "$@"',
        "  local code=$?                                   # an exception, unless it is",
        "  [[ $code == @(2|3|65|70|74) ]] && order=10      # a failure that the program foresaw,",
        "  ((code > 128 && code != 130)) && order=20       # a death by signal,",
        "  ((code == 76)) && order=30                      # a stall,",
        "  ((code == 134 || code == 143)) && order=50      # or how JAX and srun end the peers of a failed process.",
        "  ((order += asked))                              # What comes after SIGTERM is rarely the cause.",
        "  ((asked && code == 143)) && code=75             # It came before there was anything to save.",
        "  ((code == 75)) && order=95                      # Saved: no failure at all.",
        '  ((code == 0)) || echo "$order $code" >"$notes/$SLURM_PROCID"',
        '  return "$code"',
        "}",
        "export -f task",
    ]


def _step(resources: SlurmResources) -> list[str]:
    """The processes, under srun, whose environment tells JAX who they are."""
    # Since Slurm 22.05 srun does not take this over from sbatch.
    cpus = "" if resources.cpus_per_task is None else f" --cpus-per-task={resources.cpus_per_task}"
    return [
        "# Without srun a process would find no peers. When one fails, the others get SIGTERM and then SIGKILL; so do",
        "# those that are left a minute after the first was done.",
        f"srun --export=ALL{cpus} --label --kill-on-bad-exit=1 --wait=60 \\",
        """  bash -c 'task "$@"' task python -m llm_jax "${run[@]}\"""",
        "code=$?",
    ]


def _ending(resources: SlurmResources) -> list[str]:
    """Requeued without limit when saved (75), up to the limit when stalled (76) or killed, else never."""
    limit = resources.restarts
    return [
        "# The cause; where nobody could note anything, what srun says.",
        'read -r _ code < <(cat "$notes"/* - 2>/dev/null <<<"99 $code" | sort -n)',
        "again=",
        "if ((code == 75)); then",
        '  again="saved"',
        "elif ((code == 76 || code > 128 && code != 130)); then",
        '  restarts=$(cat "$record/restarts" 2>/dev/null || echo 0)',
        f"  if ((restarts < {limit})); then",
        '    echo $((++restarts)) >"$record/restarts"',
        f'    again="restart $restarts of {limit}"',
        "  fi",
        "fi",
        "if [[ $again ]]; then",
        '  echo "exit code $code: requeued ($again)"',
        "  # Slurm ends this script when it requeues the job, sleep first. One that ends by itself would end it.",
        '  scontrol requeue "$job" && { sleep 600; exit "$code"; }',
        "fi",
        'echo "exit code $code: the job ends"',
        '((code == 0)) && rm -rf "$record"',
        'exit "$code"',
    ]
