"""A job as a Kubernetes JobSet: one Job a slice, one pod a host, one process a pod; Kueue's where a queue is named."""

import re
import subprocess
import sys
from typing import Any

import yaml

from llm_jax import exit_codes
from llm_jax.exit_codes import AGAIN, DONE, MEANINGS, STALLED, UNEXPECTED, Failure
from llm_jax.launch.config import JobSetResources
from llm_jax.launch.job import Job, is_retried

# A part of a manifest, as YAML and JSON know it.
Node = dict[str, Any]

_SLICE, _CONTAINER = "slice", "train"
_MAX_NAME = 63  # of a pod, whose name is a DNS label too
_RANDOM = "-xxxxx"  # what Kubernetes appends to a pod's name
_SLICE_INDEX = "metadata.labels['jobset.sigs.k8s.io/job-index']"
_HOST_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_TPU = "google.com/tpu"
# JAX then fails where the device does not come up, instead of training on the CPU.
_PLATFORMS = {None: "cpu", _TPU: "tpu,cpu", "nvidia.com/gpu": "cuda,cpu"}

# What is told in a line, by a code of its own: another attempt would end alike.
_TOLD = sorted(MEANINGS.keys() - {DONE, UNEXPECTED, AGAIN, STALLED})
# The plain signals are numbered to 31. 255 is what containerd says of a container that its machine took along.
_RETRIED = [*(code for code in range(128 + 32) if is_retried(code)), 255]

# How a pod may end, and what the JobSet then does. The order matters twice. A pod is judged by the first rule that fits
# it. And where several Jobs have failed by the time JobSet looks, its first rule that fits any of them wins, not the
# first Job that failed: what a process tells of itself comes before the deaths that follow from it at its peers (by
# signal, mostly: JAX aborts them), and those before exceptions, which may follow from either.
_RULES: tuple[tuple[str, Node, str], ...] = (
    (
        "Disrupted",
        {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        "RestartJobSetAndIgnoreMaxRestarts",
    ),
    ("Saved", {"onExitCodes": {"operator": "In", "values": [AGAIN]}}, "RestartJobSetAndIgnoreMaxRestarts"),
    ("Told", {"onExitCodes": {"operator": "In", "values": _TOLD}}, "FailJobSet"),
    ("StalledOrKilled", {"onExitCodes": {"operator": "In", "values": _RETRIED}}, "RestartJobSet"),
    ("Unexpected", {"onExitCodes": {"operator": "NotIn", "values": [DONE]}}, "FailJobSet"),
)

_HEADER = """\
# Made by `llm-jax launch jobset`; needs JobSet 0.10 or newer. Submit with: kubectl create -f FILE
# Rule N of podFailurePolicy says how a pod ended, rule N of failurePolicy what follows:
#   0 disrupted (preempted, evicted, drained), 1 saved ({saved}): all pods start again, as often as it takes
#   2 told what is wrong ({told}): the end
#   3 stalled ({stalled}) or died by a signal: all pods start again, at most {restarts} times
#   4 ended with anything else: the end
# A pod that fails before its program has an exit code fits none: JobSet starts all again, and counts it.
"""


class NotSubmitted(Failure):
    """kubectl is missing, or did not take the manifest."""

    exit_code = exit_codes.NO


def render(job: Job, resources: JobSetResources) -> str:
    """The manifest, in YAML."""
    told = ", ".join(str(code) for code in _TOLD)
    header = _HEADER.format(saved=AGAIN, told=told, stalled=STALLED, restarts=resources.restarts)
    # None: what holds no mapping or list of its own stands on one line.
    return header + yaml.safe_dump(_manifest(job, resources), sort_keys=False, default_flow_style=None, width=200)


def submit(manifest: str) -> int:
    """Gives the manifest to kubectl; returns the exit code. Raises NotSubmitted, with what kubectl said.

    It creates and does not apply: of a JobSet that exists little may change, and one that has ended would not start.
    """
    try:
        command = ["kubectl", "create", "-f", "-"]
        done = subprocess.run(command, input=manifest, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotSubmitted(f"kubectl: {error.strerror}; --submit works where kubectl is") from None
    if done.returncode:
        raise NotSubmitted(" ".join(f"not submitted; kubectl said: {done.stderr}".split()))
    sys.stdout.write(done.stdout + done.stderr)
    return exit_codes.DONE


def _manifest(job: Job, resources: JobSetResources) -> Node:
    name = _name(job.runs[0].name, resources)
    metadata: Node = {"name": name}
    if resources.namespace is not None:
        metadata["namespace"] = resources.namespace
    if resources.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": resources.queue}
    if resources.topology is not None:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": resources.topology}
    job_spec = {
        "parallelism": resources.hosts,
        "completions": resources.hosts,
        "completionMode": "Indexed",
        # Whether to start again is the JobSet's to say: one pod alone cannot join a world that lost it.
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [_pod_rule(requirement) for _, requirement, _ in _RULES]},
        "template": {"spec": _pod(job.command(0), name, resources)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # The subdomain is the headless service under which pods find each other.
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": resources.restarts,
                # The pods of the last attempt are all gone before the first of the next one starts.
                "restartStrategy": "BlockingRecreate",
                "rules": [_jobset_rule(index, name, action) for index, (name, _, action) in enumerate(_RULES)],
            },
            "replicatedJobs": [{"name": _SLICE, "replicas": resources.slices, "template": {"spec": job_spec}}],
        },
    }


def _pod_rule(requirement: Node) -> Node:
    """The pod failure policy's rule. The container is named, for others (mounts, proxies) may be injected."""
    if "onExitCodes" in requirement:
        requirement = {"onExitCodes": {"containerName": _CONTAINER, **requirement["onExitCodes"]}}
    return {"action": "FailJob", **requirement}


def _jobset_rule(index: int, name: str, action: str) -> Node:
    """What follows from the pod rule of that index.

    The Job's message is all that names the rule, and in Kubernetes' source (matchPodFailurePolicy, from the first
    version of 2022 to now) it ends with "matching FailJob rule at index N". That is no documented interface; should it
    change, no rule fits, and JobSet's default is a counted restart.
    """
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f"rule at index {index}$"],
    }


def _pod(arguments: list[str], name: str, resources: JobSetResources) -> Node:
    spec: Node = {"restartPolicy": "Never", "terminationGracePeriodSeconds": resources.grace_seconds}
    if resources.service_account is not None:
        spec["serviceAccountName"] = resources.service_account
    if resources.priority_class is not None:
        spec["priorityClassName"] = resources.priority_class
    if resources.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if resources.node_selector:
        spec["nodeSelector"] = resources.node_selector
    if resources.accelerator is not None:
        # Nodes with accelerators are commonly tainted by the resource's name, to keep everyone else away.
        spec["tolerations"] = [{"key": resources.accelerator, "operator": "Exists"}]
    volumes, mounts = _volumes(resources)
    spec["containers"] = [_container(arguments, name, resources) | ({"volumeMounts": mounts} if mounts else {})]
    return spec | ({"volumes": volumes} if volumes else {})


def _container(arguments: list[str], name: str, resources: JobSetResources) -> Node:
    command = ["llm-jax"]
    if resources.slices > 1:
        # Kubernetes numbers slices, and hosts in a slice; only a shell can count them in one row. exec: SIGTERM goes to
        # the program. What follows the script are $0 and "$@", which need no quoting.
        rank = f"$((JAX_PARTITION_INDEX * {resources.hosts} + JOB_COMPLETION_INDEX))"
        command = ["/bin/sh", "-c", f'export JAX_PROCESS_ID={rank} && exec llm-jax "$@"', "llm-jax"]
    container: Node = {
        "name": _CONTAINER,
        "image": resources.image,
        "workingDir": resources.working_dir,
        "command": command,
        "args": [_literal(argument) for argument in arguments],
        "env": _environment(name, resources),
    }
    requests = {"cpu": resources.cpu, "memory": resources.memory}
    asked: Node = {}
    if any(amount is not None for amount in requests.values()):
        asked["requests"] = {key: amount for key, amount in requests.items() if amount is not None}
    if resources.accelerator is not None:
        asked["limits"] = {resources.accelerator: str(resources.devices_per_host)}
    return container | ({"resources": asked} if asked else {})


def _environment(name: str, resources: JobSetResources) -> list[Node]:
    """Who the process is, and the variables that were asked for; those come last, so that they hold.

    TPUs get the same three variables, before which JAX's own detection stands back. The numbers are the same: on GKE a
    TPU's worker is the pod's completion index, its slice the Job's index [from documents, not measured]. And then the
    size of the world is asserted, also where GKE tells the pods nothing (TPU_WORKER_HOSTNAMES, MEGASCALE_*).
    """
    coordinator = f"{name}-{_SLICE}-0-0.{name}:{resources.coordinator_port}"
    said = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(resources.n_processes)}
    if resources.slices > 1:
        # JAX, too, wants to know who shares a fast network: the devices' slice_index is this on GPUs.
        who = ("JAX_PARTITION_INDEX", _SLICE_INDEX)
    else:
        who = ("JAX_PROCESS_ID", _HOST_INDEX)
    if resources.accelerator in _PLATFORMS:
        said["JAX_PLATFORMS"] = _PLATFORMS[resources.accelerator]
    if resources.accelerator is None:
        said["JAX_NUM_CPU_DEVICES"] = str(resources.devices_per_host)
    said |= {key: _literal(value) for key, value in resources.environment.items()}
    return [
        {"name": who[0], "valueFrom": {"fieldRef": {"fieldPath": who[1]}}},
        *({"name": key, "value": value} for key, value in said.items()),
    ]


def _volumes(resources: JobSetResources) -> tuple[list[Node], list[Node]]:
    """The pod's volumes and the container's mounts; a claim that is mounted twice is one volume."""
    volumes: list[Node] = []
    mounts: list[Node] = []
    if resources.accelerator not in (None, _TPU):
        # NCCL's shared memory; a container has 64 MiB of it by default.
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    claims = list(dict.fromkeys(resources.claims.values()))
    volumes += [{"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": name}} for i, name in enumerate(claims)]
    mounts += [{"name": f"claim-{claims.index(name)}", "mountPath": path} for path, name in resources.claims.items()]
    return volumes, mounts


def _literal(text: str) -> str:
    """Text that Kubernetes leaves alone: it replaces $(NAME) in arguments and variables, and $$ by $."""
    return text.replace("$", "$$")


def _name(run_name: str, resources: JobSetResources) -> str:
    """The run's name as a DNS label that begins with a letter, short enough for the names of all pods."""
    label = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"run-{label}"
    longest = f"-{_SLICE}-{resources.slices - 1}-{resources.hosts - 1}{_RANDOM}"
    return label[: _MAX_NAME - len(longest)].strip("-")
