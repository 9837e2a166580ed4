"""A JobSet: held against the published models, its restart rules read, its pods run as processes of this machine."""

import copy
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_jax import exit_codes
from llm_jax.launch import jobset
from llm_jax.launch.config import JobSetResources
from llm_jax.launch.job import Job, is_retried, is_saved, read_job, read_resources
from tests.conftest import ROOT, Cli, Running, Start, free_port
from tests.jobset_pods import Death, Manifest, command, environment, expand, job_failure, pods, run, start_pods, verdict
from tests.test_docs import commands
from tests.training import SMALL, assert_same_history, curve, has_lines, train, wait_for

TINY = str(ROOT / "configs" / "tiny_causal.py")
# Resources, config and overrides of the examples in launch/examples.
EXAMPLES = {
    "llama3_8b_tpu": ("jobset_tpu.yaml", "llama3_8b.py", ()),
    "llama3_8b_gpu": ("jobset_gpu.yaml", "llama3_8b.py", ("train.accumulation=8",)),
}
UNCOUNTED, COUNTED, FAIL = "RestartJobSetAndIgnoreMaxRestarts", "RestartJobSet", "FailJobSet"


def job_of(resources: JobSetResources, *overrides: str) -> Job:
    return read_job([TINY], overrides, resources)


def manifest(resources: JobSetResources, *overrides: str) -> Manifest:
    return yaml.safe_load(jobset.render(job_of(resources, *overrides), resources))


def a_manifest(slices: int = 1, hosts: int = 2, *overrides: str) -> Manifest:
    return manifest(JobSetResources(image="image", slices=slices, hosts=hosts), *overrides)


EVERYTHING = JobSetResources(
    image="registry.example.com/image:1", slices=2, hosts=4, devices_per_host=2, accelerator="nvidia.com/gpu",
    node_selector={"pool": "h100"}, topology="rack", host_network=True, cpu="96", memory="900Gi", namespace="research",
    queue="queue", priority_class="high", service_account="account", claims={"/runs": "runs", "/data": "data"},
    working_dir="/here", grace_seconds=60, restarts=5, environment={"NCCL_DEBUG": "INFO"},
)  # fmt: skip


def leaves(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield path, node
        return
    for key, value in items:
        yield from leaves(value, (*path, key))


def lost(made: Manifest) -> list[tuple[str | int, ...]]:
    """The leaves that do not come back from the published models. Raises ValueError for what they refuse."""
    # A second to import, which each worker of the suite would spend.
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    read = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(made))
    assert read is not None
    back = dict(leaves(read.to_dict()))
    return [path for path, value in leaves(made) if path not in back or back[path] != value]


@pytest.mark.parametrize(
    "resources",
    [EVERYTHING, JobSetResources(image="image"), JobSetResources(image="i", accelerator="google.com/tpu", slices=2)],
    ids=["everything", "nothing", "tpu"],
)
def test_every_leaf_survives_the_published_models(resources: JobSetResources) -> None:
    made = manifest(resources)
    assert lost(made) == []
    assert len(list(leaves(made))) > 60


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("replicatedJobs", 0, "template", "spec"), "backofLimit", 0),
        (("failurePolicy",), "maxRestart", 3),
        (("failurePolicy", "rules", 0), "onJobFailureMessagePattern", ["x"]),
        (("replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "workDir", "/"),
        (("replicatedJobs", 0, "template", "spec"), "completionMode", "Indexd"),
        (("replicatedJobs", 0, "template", "spec"), "parallelism", "4"),
        (("replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 1, "onExitCodes"), "operator", "Is"),
    ],
)
def test_a_typo_does_not_survive(path: tuple[str | int, ...], key: str, value: Any) -> None:
    made = a_manifest()
    node: Any = made["spec"]
    for step in path:
        node = node[step]
    node[key] = value
    try:
        missing = lost(made)
    except ValueError:
        return
    assert ("spec", *path, key) in [found[: len(path) + 2] for found in missing]


def test_kubernetes_would_take_the_exit_codes() -> None:
    """What its validation asks for and the models do not say: sorted, each once, no 0 with In, at most 255 of them."""
    for rule in a_manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["values"] == sorted(set(codes["values"])) and len(codes["values"]) <= 255
            assert codes["operator"] == "NotIn" or 0 not in codes["values"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_is_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file, config, overrides = EXAMPLES[name]
    resources = read_resources(f"launch/{file}", JobSetResources)
    text = jobset.render(read_job([f"configs/{config}"], overrides, resources), resources)
    assert text == Path("launch/examples", f"{name}.jobset.yaml").read_text()
    assert lost(yaml.safe_load(text)) == []


def test_the_readme_s_command_prints_the_example(tmp_path: Path) -> None:
    section = (ROOT / "launch" / "README.md").read_text().partition("## Kubernetes (JobSet)")[2].partition("\n## ")[0]
    (line,) = commands(section)
    image = image_of(tmp_path / "image", "-m", "llm_jax")
    env = os.environ | {"PATH": f"{image}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-ec", line], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "launch" / "examples" / "llama3_8b_tpu.jobset.yaml").read_text()


def test_what_was_asked_for_is_where_kubernetes_looks_for_it() -> None:
    made = manifest(EVERYTHING)
    assert made["metadata"] == {
        "name": "tiny-causal",
        "namespace": "research",
        "labels": {"kueue.x-k8s.io/queue-name": "queue"},
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "rack"},
    }
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 5
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    pod = job["template"]["spec"]
    assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("account", "high")
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 60)
    assert pod["nodeSelector"] == {"pool": "h100"} and pod["hostNetwork"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    (container,) = pod["containers"]
    assert container["image"] == EVERYTHING.image and container["workingDir"] == "/here"
    assert container["resources"] == {
        "requests": {"cpu": "96", "memory": "900Gi"},
        "limits": {"nvidia.com/gpu": "2"},
    }
    sources = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: sources[mount["name"]] for mount in container["volumeMounts"]}
    assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert mounted["/runs"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert mounted["/data"]["persistentVolumeClaim"] == {"claimName": "data"}


def test_a_claim_that_is_mounted_twice_is_one_volume() -> None:
    made = manifest(JobSetResources(image="image", claims={"/runs": "disk", "/data": "disk"}))
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert len(pod["volumes"]) == 1 and len(pod["containers"][0]["volumeMounts"]) == 2


def test_without_a_wish_nothing_is_said_of_it() -> None:
    made = a_manifest()
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert made["metadata"] == {"name": "tiny-causal"}
    assert set(pod) == {"restartPolicy", "terminationGracePeriodSeconds", "containers"}
    assert "resources" not in pod["containers"][0]


@pytest.mark.parametrize(
    ("run_name", "expected"),
    [
        ("tiny_causal", "tiny-causal"),
        ("Llama 3.1: 8B (try #2)", "llama-3-1-8b-try-2"),
        ("8b", "run-8b"),
        ("模型", "run"),
        ("x" * 100, None),
        (("x" * 44 + "-") * 2, None),
    ],
)
def test_the_name_is_a_dns_label_with_room_for_those_of_the_pods(run_name: str, expected: str | None) -> None:
    resources = JobSetResources(image="image", slices=4, hosts=16)
    made = manifest(resources, f"name={run_name}", "train.batch_rows=64", "eval.batch_rows=64")
    name = made["metadata"]["name"]
    assert expected in (name, None)
    for pod in pods(made):
        label = pod.host.partition(".")[0] + "-abcde"
        assert len(label) <= 63 and label.isascii()
        assert label[0].isalpha() and "--" not in label and label.replace("-", "").isalnum() and label == label.lower()


def test_overrides_reach_the_program_as_they_were_typed(tmp_path: Path) -> None:
    """Quotes, spaces, and what Kubernetes or a shell would replace: through an array of words, and through a shell."""
    overrides = ('name=it\'s a "run"', "run_dir=runs/$(HOME) $HOME `id` $$ \\n", "seed=3")
    show = tmp_path / "llm-jax"
    show.write_text(f"#!{sys.executable}\nimport sys; print(sys.argv[1:])\n")
    show.chmod(stat.S_IRWXU)
    for slices in (1, 2):
        resources = JobSetResources(image="image", slices=slices, environment={"HOME": "replaced", "A": "$(HOME) $$"})
        everyone = pods(manifest(resources, *overrides))
        for pod in everyone:
            variables = environment(pod, [other.host for other in everyone])
            assert variables["A"] == "$(HOME) $$"
            env = variables | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
            words = command(pod, variables)
            done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
            assert done.stdout == f"{['train', TINY, *overrides]}\n"


def test_expansion_is_kubernetes_s() -> None:
    variables = {"A": "1", "B": "$(A)"}
    assert expand("$(A) $(C) $$(A) $$$(A) $A $(B) $((A + 1)) $", variables) == "1 $(C) $(A) $1 $A $(A) $((A + 1)) $"


# Restarts


def expected_verdict(exit_code: int) -> str:
    return UNCOUNTED if is_saved(exit_code) else COUNTED if is_retried(exit_code) else FAIL


def test_every_exit_code_leads_where_the_launchers_say() -> None:
    made = a_manifest()
    died = [128 + number for number in range(1, 32)]
    for code in {*exit_codes.MEANINGS, *died, 4, 64, 126, 127, 128} - {0}:
        assert verdict(made, Death(0, code)) == expected_verdict(code), code
    # 255 is a container of which its machine forgot how it ended.
    assert verdict(made, Death(0, 255)) == COUNTED
    assert {code: verdict(made, Death(0, code)) for code in (1, 70, 75, 76, 137)} == {
        1: FAIL, 70: FAIL, 75: UNCOUNTED, 76: COUNTED, 137: COUNTED,
    }  # fmt: skip


def test_a_disruption_is_not_counted_however_the_pod_ended() -> None:
    for code in (None, 1, 75, 137, 143):
        assert verdict(a_manifest(), Death(0, code, disrupted=True)) == UNCOUNTED


def test_a_pod_that_never_ran_is_a_counted_restart() -> None:
    made = a_manifest()
    assert job_failure(made, Death(0, None))[0] == "BackoffLimitExceeded"
    assert verdict(made, Death(0, None)) == COUNTED


@pytest.mark.parametrize(
    ("deaths", "expected"),
    [
        # A preempted slice, and the peers' deaths of it.
        ((Death(0, 137, disrupted=True), Death(1, 134)), UNCOUNTED),
        ((Death(0, 75), Death(1, 1)), UNCOUNTED),
        # Bad data told by one, and the peers' deaths of it.
        ((Death(0, 65), Death(1, 134)), FAIL),
        # A crash, and the exceptions that it makes at its peers.
        ((Death(0, 139), Death(1, 1)), COUNTED),
        ((Death(0, 76), Death(1, 134)), COUNTED),
        ((Death(0, 1), Death(1, 1)), FAIL),
    ],
)
def test_of_several_failed_slices_the_one_that_says_most_decides(deaths: tuple[Death, ...], expected: str) -> None:
    """JobSet may look only when several Jobs have failed, in whatever order."""
    made = a_manifest(slices=2)
    for order in itertools.permutations(deaths):
        assert verdict(made, *order) == expected


def test_planted_rules_in_another_order_are_noticed() -> None:
    made = a_manifest(slices=2)
    made["spec"]["failurePolicy"]["rules"].reverse()
    assert verdict(made, Death(0, 139), Death(1, 1)) != COUNTED
    made = a_manifest()
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"].reverse()
    assert verdict(made, Death(0, 70)) != FAIL


# The verb, and kubectl


def test_the_verb_prints_the_manifest_and_checks_the_mesh_first(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "pods.yaml"
    file.write_text("image: image\nhosts: 2\ndevices_per_host: 2\n")
    done = cli("launch", "jobset", TINY, "seed=3", "--resources", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    resources = read_resources(str(file), JobSetResources)
    assert done.stdout == jobset.render(job_of(resources, "seed=3"), resources)
    done = cli("launch", "jobset", TINY, "mesh.data=2", "--resources", str(file))
    assert done.returncode == 2
    assert "the mesh uses 2 of 4 devices" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, with a kubectl that says what it was given and fails as it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "text = sys.stdin.read()\n"
        "print(sys.argv[1:], len(text), text.count('kind: JobSet'))\n"
        "sys.exit(os.environ.get('REFUSAL'))\n"
    )
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder))
    return program


def test_submit_creates_it(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resources = JobSetResources(image="image")
    text = jobset.render(job_of(resources), resources)
    assert jobset.submit(text) == 0
    assert capsys.readouterr().out == f"['create', '-f', '-'] {len(text)} 1\n"


def test_what_kubectl_has_to_say_is_one_line(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSAL", "error: no\n  such server")
    with pytest.raises(jobset.NotSubmitted) as error:
        jobset.submit("kind: JobSet")
    assert str(error.value) == "not submitted; kubectl said: error: no such server"
    assert error.value.exit_code == exit_codes.NO
    kubectl.unlink()
    with pytest.raises(jobset.NotSubmitted, match=r"^kubectl: No such file or directory; --submit works where"):
        jobset.submit("kind: JobSet")


# Pods as processes

# In place of llm-jax: the world that the pods form, by the program's own way of joining it.
WORLD = """\
import jax
from jax.experimental import multihost_utils
from llm_jax.distributed import join_processes
join_processes(heartbeat_s=60, patience_s=60)
total = multihost_utils.process_allgather(jax.numpy.float32(2.0 ** jax.process_index())).sum()
print(jax.process_index(), jax.process_count(), jax.device_count(), jax.local_device_count(), int(total), flush=True)
jax.distributed.shutdown()
"""


def image_of(folder: Path, *python: str) -> Path:
    """A folder with a llm-jax that is this Python with the given arguments, and then its own."""
    folder.mkdir()
    program = folder / "llm-jax"
    words = " ".join(f"'{word}'" for word in (sys.executable, *python))
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(stat.S_IRWXU)
    return folder


@pytest.mark.parametrize(("slices", "hosts"), [(2, 2), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_the_pods_form_one_world(start: Start, tmp_path: Path, slices: int, hosts: int) -> None:
    (tmp_path / "world.py").write_text(WORLD)
    resources = JobSetResources(
        image="image", slices=slices, hosts=hosts, devices_per_host=2,
        working_dir=str(tmp_path), coordinator_port=free_port(),
    )  # fmt: skip
    image = image_of(tmp_path / "image", str(tmp_path / "world.py"))
    n = slices * hosts
    made = manifest(resources, "train.batch_rows=24", "eval.batch_rows=24")
    for rank, pod in enumerate(start_pods(made, start, image)):
        done = pod.wait(120)
        assert done.returncode == 0, done.stderr
        assert f"{rank} {n} {2 * n} 2 {2**n - 1}" in done.stdout.splitlines(), done.stdout
    assert [(pod.job, pod.index) for pod in pods(made)] == list(itertools.product(range(slices), range(hosts)))


def test_a_wrong_name_of_the_coordinator_is_noticed() -> None:
    made = a_manifest()
    made["spec"]["network"]["subdomain"] = "other"
    everyone = pods(made)
    with pytest.raises(LookupError, match=r"tiny-causal-slice-0-0\.tiny-causal: no such pod"):
        environment(everyone[0], [pod.host for pod in everyone])


@pytest.mark.slow
def test_pods_train_save_and_start_again(start: Start, tmp_path: Path) -> None:
    """One of two pods is asked to stop and both save, then both are killed: the curve of two undisturbed processes."""
    image, pods_run, plain = image_of(tmp_path / "image", "-m", "llm_jax"), tmp_path / "pods", tmp_path / "plain"
    short = ("train.steps=16",)
    resources = JobSetResources(
        image="image", hosts=2, working_dir=str(tmp_path), coordinator_port=free_port(), restarts=1
    )
    wishes = {wish.partition("=")[0]: wish for wish in (*SMALL, f"run_dir={pods_run}", *short)}

    def disturb(attempt: int, running: list[Running]) -> None:
        if attempt == 2:
            return
        seen = len(curve(pods_run)) if attempt else 0
        wait_for(lambda: has_lines(pods_run, seen + 4), running[0])
        if attempt == 0:
            running[1].process.terminate()
        else:
            for pod in running:
                pod.process.kill()

    ended, attempts = run(manifest(resources, *wishes.values()), start, image, disturb)
    assert (ended, attempts) == ("Completed", [[75, 75], [137, 137], [0, 0]])
    world = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [start(*train(plain, *short), env=world | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    for process in both:
        assert process.wait().returncode == 0
    assert_same_history(pods_run, plain, 16)
