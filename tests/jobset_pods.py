"""A JobSet without a cluster: its pods as processes of this machine, and what its rules say when one of them ends.

It reads the manifest as Kubernetes and JobSet do, and nothing but the manifest: which pods there are and what they are
called, what $(NAME) and fieldRef become, who finds whom under which name, which failure leads where.
"""

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import Running, Start

Manifest = dict[str, Any]
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"


@dataclasses.dataclass(frozen=True)
class Pod:
    """One pod: which Job's and which of it, its name in the cluster's DNS, and what its fieldRefs can say."""

    job: int
    index: int
    host: str
    fields: Mapping[str, str]
    container: Mapping[str, Any]


def pods(manifest: Manifest) -> list[Pod]:
    """All pods of a JobSet, in the order of Jobs and of completion indices."""
    name, found = manifest["metadata"]["name"], []
    subdomain = manifest["spec"]["network"].get("subdomain", name)
    assert manifest["spec"]["network"]["enableDNSHostnames"]
    for replicated in manifest["spec"]["replicatedJobs"]:
        spec = replicated["template"]["spec"]
        assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
        (container,) = spec["template"]["spec"]["containers"]
        for job in range(replicated["replicas"]):
            for index in range(spec["completions"]):
                both = {
                    "jobset.sigs.k8s.io/jobset-name": name,
                    "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
                    "jobset.sigs.k8s.io/job-index": str(job),
                    COMPLETION_INDEX: str(index),
                }
                fields = {f"metadata.{kind}['{key}']": both[key] for kind in ("labels", "annotations") for key in both}
                host = f"{name}-{replicated['name']}-{job}-{index}.{subdomain}"
                found.append(Pod(job, index, host, fields, container))
    return found


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Text with $(NAME) replaced where there is such a variable, and $$ by $, as the kubelet does."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


def environment(pod: Pod, hosts: Sequence[str]) -> dict[str, str]:
    """The container's variables in their order, every pod's name resolved to this machine.

    Raises KeyError for a field that no pod has, LookupError for a name that the cluster's DNS would not know.
    """
    variables = {}
    for item in pod.container["env"]:
        value = item.get("value")
        if value is None:
            value = pod.fields[item["valueFrom"]["fieldRef"]["fieldPath"]]
        variables[item["name"]] = expand(value, variables)
    # The Job controller's own, for an Indexed Job.
    variables.setdefault("JOB_COMPLETION_INDEX", pod.fields[f"metadata.annotations['{COMPLETION_INDEX}']"])
    host, colon, port = variables["JAX_COORDINATOR_ADDRESS"].rpartition(":")
    if host not in hosts:
        raise LookupError(f"{host}: no such pod; there are {', '.join(hosts)}")
    return {**variables, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1{colon}{port}"}


def command(pod: Pod, variables: Mapping[str, str]) -> list[str]:
    """What the container executes."""
    return [expand(word, variables) for word in (*pod.container["command"], *pod.container["args"])]


def start_pods(manifest: Manifest, start: Start, image: Path) -> list[Running]:
    """Every pod as a process; image is a folder that comes first on PATH, in place of the container's image."""
    everyone, running = pods(manifest), []
    for pod in everyone:
        variables = environment(pod, [other.host for other in everyone])
        words = command(pod, variables)
        path = {"PATH": f"{image}{os.pathsep}{os.environ['PATH']}"}
        become = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
        running.append(start("-c", become, *words, env=variables | path, cwd=Path(pod.container["workingDir"])))
    return running


@dataclasses.dataclass(frozen=True)
class Death:
    """How a pod failed; a pod that never had an exit code has none."""

    job: int
    exit_code: int | None
    disrupted: bool = False


def job_failure(manifest: Manifest, death: Death) -> tuple[str, str]:
    """The reason and the message with which the pod's Job fails.

    They follow the wording of Kubernetes' matchPodFailurePolicy; a Job without backoffLimit fails of any pod.
    """
    (replicated,) = manifest["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["backoffLimit"] == 0
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        matching = f"matching FailJob rule at index {index}"
        for condition in rule.get("onPodConditions", []):
            if death.disrupted and condition == {"type": "DisruptionTarget", "status": "True"}:
                return "PodFailurePolicy", f"Pod default/pod has condition DisruptionTarget {matching}"
        if "onExitCodes" in rule and death.exit_code:
            codes = rule["onExitCodes"]
            assert codes["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
            if (death.exit_code in codes["values"]) == {"In": True, "NotIn": False}[codes["operator"]]:
                said = f"Container {codes['containerName']} for pod default/pod failed with exit code {death.exit_code}"
                return "PodFailurePolicy", f"{said} {matching}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def verdict(manifest: Manifest, *deaths: Death) -> str:
    """The JobSet's action: of its first rule that fits any of the Jobs that have failed, else its default."""
    failures = [job_failure(manifest, death) for death in deaths]
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        for reason, message in failures:
            patterns = rule["onJobFailureMessagePatterns"]
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
    return "RestartJobSet"


def run(
    manifest: Manifest, start: Start, image: Path, during: Callable[[int, list[Running]], None], grace_s: float = 20
) -> tuple[str, list[list[int]]]:
    """Runs the JobSet to its end: "Completed" or "FailJobSet", and the exit codes of each attempt's pods.

    during(attempt, pods) is called once the pods of an attempt are started. After the first failure the others get
    SIGTERM, and grace_s seconds later SIGKILL; all are gone before the next attempt starts (BlockingRecreate).
    """
    assert manifest["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    attempts: list[list[int]] = []
    counted = 0
    while True:
        running = start_pods(manifest, start, image)
        during(len(attempts), running)
        first = _first_failure(running)
        if first is not None:
            _end(running, grace_s)
        attempts.append([_exit_code(pod) for pod in running])
        if first is None:
            return "Completed", attempts
        action = verdict(manifest, Death(pods(manifest)[first].job, _exit_code(running[first])))
        counted += action == "RestartJobSet"
        if action == "FailJobSet" or counted > manifest["spec"]["failurePolicy"]["maxRestarts"]:
            return "FailJobSet", attempts


def _first_failure(running: Sequence[Running], timeout_s: float = 300) -> int | None:
    """Which pod failed first; None when all have ended well."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        codes = [pod.process.poll() for pod in running]
        failed = [i for i, code in enumerate(codes) if code]
        if failed or codes == [0] * len(codes):
            return failed[0] if failed else None
        time.sleep(0.05)
    raise TimeoutError(f"the pods ran for more than {timeout_s} s: {[pod.done() for pod in running]}")


def _end(running: Sequence[Running], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    for pod in running:
        if pod.process.poll() is None:
            pod.process.send_signal(signal.SIGTERM)
    while time.monotonic() < deadline and any(pod.process.poll() is None for pod in running):
        time.sleep(0.05)
    for pod in running:
        pod.kill()


def _exit_code(pod: Running) -> int:
    """A container's exit code: of a death by signal n, 128 + n."""
    code = pod.process.returncode
    return 128 - code if code < 0 else code
