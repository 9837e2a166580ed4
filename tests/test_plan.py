"""`llm-jax plan`: what it says is what the step is; what does not fit is told, with what is missing and what helps."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax import __main__ as program
from llm_jax.config import ConfigError, load
from llm_jax.exit_codes import DONE, NO, USAGE
from llm_jax.mesh import make_mesh
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.plan import chips, search
from llm_jax.plan import compile as compiling
from llm_jax.plan.account import leaves, replicated_share, whole_on_devices
from llm_jax.plan.arithmetic import product_flops, routed_share
from llm_jax.plan.compile import Compiled
from llm_jax.plan.fit import changes
from llm_jax.plan.memory import estimate
from llm_jax.plan.plan import Plan, fit_mesh, make_plan
from llm_jax.plan.roofline import roofline
from llm_jax.run import Run, axis_sizes, from_command_line, mesh_sizes
from llm_jax.train import flops
from llm_jax.train.config import MeshConfig, TrainConfig
from llm_jax.train.start import trace_step
from tests.chips import mesh_on
from tests.small import mesh_of, slowly
from tests.test_configs import CONFIGS, DEVICES

TINY = str(CONFIGS["tiny_causal"])
SMALL = ["model.d_model=32", "model.d_ff=48", "model.n_layers=2", "data.seq_len=64", "mesh.data=-1"]
MESH = ["mesh.fsdp=4", "mesh.tensor=2"]
NARROW = ("model.d_model=512", "model.d_ff=1024", "model.n_heads=4", "model.n_kv_heads=4", "model.n_layers=2")
NARROW += ("model.vocab_size=4096", "data.seq_len=1024")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What other checkouts compiled says nothing about this one; and the compiler's processes do not optimise code,
    which changes no program's sizes."""
    with pytest.MonkeyPatch.context() as patch:
        quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {quickly}")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the verb."""
    code = program.main(["plan", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_plan_tells_what_the_step_is_and_compiles_it_once(capsys) -> None:
    code, out, err = plan(capsys, TINY, *SMALL, *MESH, "--topology", "cpu:8", "--json")
    assert code == DONE and "compiling the step for cpu:8" in err
    told = json.loads(out)
    assert told["fits"] and told["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1, "expert": 1}

    run = load(TINY, Run).model_copy(update={})
    assert told["memory"]["arguments"] > told["state"]["weights"]["on_a_device"] * 3
    assert told["state"]["weights"]["bytes"] == 4 * told["parameters"]
    assert told["state"]["weights"]["on_a_device"] < told["state"]["weights"]["bytes"] / 7
    assert told["state"]["optimizer.mu"] == told["state"]["weights"] == told["state"]["optimizer.nu"]
    by_axes = {tuple(one["axes"]) for one in told["collectives"]}
    assert {("fsdp",), ("tensor",)} <= by_axes
    # The seven matrices of each of two layers and the two tables are gathered over fsdp, in both passes at most.
    gathers = sum(one["runs"] for one in told["collectives"] if one["kind"] == "all-gather")
    assert 7 * 2 + 2 <= gathers <= 2 * (7 * 2 + 2)
    assert all(one["largest_gather"] < told["state"]["weights"]["bytes"] / 2 for one in told["collectives"])
    assert run.model.compute_dtype == "float32" and told["step"] is None

    again, page, err = plan(capsys, TINY, *SMALL, *MESH, "--topology", "cpu:8")
    assert again == DONE and "compiled before" in err
    assert "tiny_causal on cpu:8 (fsdp 4 x tensor 2) fits" in " ".join(page.split())
    assert "no peak is known for cpu" in page


def test_what_does_not_fit_exits_with_3_and_tells_how_much_is_missing(capsys, monkeypatch) -> None:
    small = chips.CHIPS["cpu"]._replace(memory=100_000.0)
    monkeypatch.setitem(chips.CHIPS, "cpu", small)
    code, out, err = plan(capsys, TINY, *SMALL, *MESH, "--topology", "cpu:8", "--json")
    told = json.loads(out)
    assert code == NO and not told["fits"]
    assert told["memory"]["missing"] == told["memory"]["needs"] - 100_000
    assert told["largest_state"] and told["largest_temporaries"]
    line = err.splitlines()[-1]
    assert "does not fit" in line and "are missing" in line and "take more devices" in line
    assert told["change"] is None


def test_the_best_layout_is_compiled_and_no_worse_than_the_one_given(capsys, monkeypatch) -> None:
    monkeypatch.setattr(search, "TRIES", 1)
    arguments = (TINY, *SMALL, *MESH, "--topology", "cpu:8", "--search")
    code, out, err = plan(capsys, *arguments, "--json")
    told = json.loads(out)
    best, other, *estimated = told["layouts"]
    assert code == DONE and "layouts estimated" in err and "1 of 1: " in err
    assert best["compiled"] and other["compiled"] and best["fits"] and best["needs"] <= other["needs"]
    assert [] in (best["overrides"], other["overrides"]) and best["overrides"] == told["best"]
    assert estimated and not any(layout["compiled"] for layout in estimated)

    # Nothing fits into a quarter of what the smallest needs, by a compile or by an estimate.
    little = min(layout["needs"] for layout in told["layouts"]) / 4
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["cpu"]._replace(memory=little))
    code, out, err = plan(capsys, *arguments)
    assert code == NO and "compiled: does not fit, as given" in out
    assert "none that was compiled fits" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_change_that_helps_is_found_and_compiled(capsys, monkeypatch) -> None:
    def needs(*overrides: str) -> int:
        return json.loads(plan(capsys, TINY, *SMALL, *overrides, "--topology", "cpu:8", "--json")[1])["memory"]["needs"]

    as_given, divided = needs(), needs("mesh.fsdp=8")
    assert divided < as_given
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["cpu"]._replace(memory=(as_given + divided) / 2))
    code, out, err = plan(capsys, TINY, *SMALL, "--topology", "cpu:8", "--json")
    change = json.loads(out)["change"]
    assert code == NO and change["confirmed"] and change["needs"] <= (as_given + divided) / 2
    assert f"{' '.join(change['overrides'])} fits with" in err.splitlines()[-1]


def test_a_killed_plan_leaves_nothing_running() -> None:
    """The compiler's process has no other way to learn of a SIGKILL of who asked it than its own stdin."""
    ask = f"""
from llm_jax.plan import compile, chips
from llm_jax.run import from_command_line
compile._ask(from_command_line({TINY!r}, {SMALL!r}), chips.parse("cpu:8"))"""
    with subprocess.Popen([sys.executable, "-c", ask]) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        within(60, lambda: children.read_text().split())
        worker = Path("/proc", children.read_text().split()[0])
        within(60, lambda: b"plan.worker" in (worker / "cmdline").read_bytes())
        parent.kill()
    # Whether the machine's first process buries the dead is its own affair.
    within(60, lambda: not worker.exists() or b" Z " in (worker / "stat").read_bytes())


def within(seconds: float, happened: Callable[[], object]) -> None:
    """Waits for it, or fails."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", DEVICES)
def test_shipped_weights_are_divided_where_their_letters_say(name: str) -> None:
    run = load(CONFIGS[name], Run)
    axes = mesh_sizes(run.mesh, DEVICES[name])
    assert whole_on_devices(run, axes) == []
    assert replicated_share(leaves(run, axes), axes) < 0.02


def test_planted_weights_that_nothing_divides_are_seen(monkeypatch) -> None:
    from llm_jax import alphabet

    run = load(CONFIGS["gpt2_124m"], Run)
    axes = mesh_sizes(run.mesh.model_copy(update={"data": 1, "fsdp": 8}), 8)
    found = leaves(run, axes)
    planted = [leaf._replace(axes=()) if leaf.path.endswith("embed") else leaf for leaf in found]
    assert replicated_share(found, axes) < 0.02 < replicated_share(planted, axes)
    monkeypatch.setattr("llm_jax.mesh.weight_axes", lambda letters: tuple(None for _ in letters))
    assert any("is whole over fsdp" in line for line in whole_on_devices(run, axes))
    assert alphabet.weight_axes("VD") == ("tensor", "fsdp")


def test_the_state_is_twelve_bytes_a_parameter() -> None:
    run = load(CONFIGS["llama3_70b"], Run)
    found = leaves(run, mesh_sizes(run.mesh, 128))
    assert sum(leaf.bytes for leaf in found) == pytest.approx(12 * flops.parameters(run.model), rel=1e-6)
    assert sum(leaf.on_a_device for leaf in found) == pytest.approx(12 * flops.parameters(run.model) / 128, rel=5e-3)


BASE = ModelConfig(
    d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, vocab_size=200, attention="xla", remat="none"
)
MOE = MoeConfig(experts=4, top_k=2, d_ff=16, shared_d_ff=16, exchange="all_gather", grouped_matmul="ragged")
EXPERTS = BASE.model_copy(update={"period": (LayerConfig(moe=True),), "moe": MOE})
LOCAL = BASE.model_copy(update={"period": (LayerConfig(window=8), LayerConfig())})


@pytest.mark.parametrize(
    ("cfg", "mesh"),
    [
        (BASE, {"fsdp": 4, "tensor": 2}),
        (EXPERTS, {"expert": 4, "tensor": 2}),
        slowly(LOCAL, {"context": 2, "data": 4}),
    ],
    ids=["dense", "experts", "local and global"],
)
def test_the_rooflines_flops_are_the_steps_own(cfg: ModelConfig, mesh: dict[str, int]) -> None:
    run = Run(model=cfg, mesh=MeshConfig(data=1), train=TrainConfig(batch_rows=16, accumulation=2))
    run = run.model_copy(update={"data": run.data.model_copy(update={"seq_len": 32})})
    devices = mesh_of(**mesh)
    with jax.set_mesh(devices):
        traced = trace_step(run, devices, np.zeros((cfg.vocab_size, 2), bool))
    counted = product_flops(traced.jaxpr.jaxpr, routed_share(cfg, devices.shape["expert"]))
    # The reference backend computes every score, those outside of windows too.
    everywhere = cfg.model_copy(update={"period": tuple(x.model_copy(update={"window": None}) for x in cfg.period)})
    assert counted == run.tokens_per_step * flops.flops_per_token(everywhere, 32, run.objective).full


def test_the_experts_kernels_count_as_their_products() -> None:
    run = Run(model=EXPERTS, mesh=MeshConfig(data=1), train=TrainConfig(batch_rows=16))
    run = run.model_copy(update={"data": run.data.model_copy(update={"seq_len": 32})})
    mesh, counted = mesh_of(expert=2, tensor=2, fsdp=2), []
    for backend in ("ragged", "tiled"):
        moe = MOE.model_copy(update={"grouped_matmul": backend, "d_ff": 32})
        cfg = EXPERTS.model_copy(update={"moe": moe})
        with jax.set_mesh(mesh):
            traced = trace_step(run.model_copy(update={"model": cfg}), mesh, np.zeros((cfg.vocab_size, 2), bool))
        counted.append(product_flops(traced.jaxpr.jaxpr, 1 / 2))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("attention", ["splash", "flash"])
def test_every_tile_of_a_kernel_is_counted(attention: str) -> None:
    """Both make scores three times, once forward: nine products of queries' size where the reference makes six."""
    cfg = BASE.model_copy(update={"attention": attention})
    run = Run(model=cfg, mesh=MeshConfig(data=1), train=TrainConfig(batch_rows=16))
    run = run.model_copy(update={"data": run.data.model_copy(update={"seq_len": 1024})})
    devices = mesh_of(fsdp=4, tensor=2)
    with jax.set_mesh(devices):
        traced = trace_step(run, devices, np.zeros((cfg.vocab_size, 2), bool))
    expected = flops.flops_per_token(cfg, 1024, run.objective)
    assert product_flops(traced.jaxpr.jaxpr) == run.tokens_per_step * (expected.weights + 9 / 6 * expected.attention)


def test_the_slowest_part_bounds_a_step() -> None:
    run = Run(model=BASE.model_copy(update={"compute_dtype": "bfloat16"}))
    topology = chips.parse("v5p:2x2x1")
    line = roofline(run, topology, flops=4 * 459e12, moved_bytes=2765e9 / 2, collectives=())
    assert line is not None and line.bound == "compute"
    assert (line.compute, line.memory, line.best, line.worst) == (1.0, 0.5, 1.0, 1.5)
    assert line.best_mfu == pytest.approx(1.5 * line.worst_mfu)
    assert roofline(run, chips.parse("cpu:8"), 1.0, 1.0, ()) is None


def test_estimates_fall_where_memory_does() -> None:
    run = load(CONFIGS["llama3_8b"], Run)
    run = run.model_copy(update={"model": run.model.model_copy(update={"attention": "xla"})})

    def of(run: Run, **sizes: int) -> int:
        axes = axis_sizes(run.mesh) | {"data": 8, "fsdp": 8} | sizes
        return estimate(run, axes, leaves(run, axes))

    as_given = of(run)
    chunked = run.model_copy(update={"model": run.model.model_copy(update={"attention": "chunked"})})
    unmade = run.model_copy(update={"model": run.model.model_copy(update={"remat": "none"})})
    assert of(run, data=4, fsdp=16) < as_given
    assert of(chunked) < as_given < of(unmade)


def test_changes_come_from_the_cheapest_to_the_dearest() -> None:
    model = BASE.model_copy(update={"remat": "none"})
    run = Run(model=model, mesh=MeshConfig(data=2, fsdp=4), train=TrainConfig(batch_rows=32))
    axes = mesh_sizes(run.mesh, 8)
    nothing = Compiled(0, 0, 0, False, {}, (), (), 0, 0, None)
    found = list(changes(Plan(run, chips.parse("cpu:8"), axes, leaves(run, axes), nothing, 1.0, None)))
    assert found[:5] == [
        ("mesh.fsdp=8", "mesh.data=-1"),
        ("model.remat=full",),
        ("train.accumulation=2",),
        ("train.accumulation=4",),
        ("model.attention=chunked",),
    ]
    assert found[-1] == tuple(
        ("model.remat=full train.accumulation=4 model.attention=chunked " + " ".join(found[0])).split()
    )


def test_a_mesh_leaves_no_device_out() -> None:
    run = load(TINY, Run).model_copy(update={"mesh": MeshConfig(data=2)})
    with pytest.raises(ConfigError, match=r"uses 2 of the 8 devices of cpu:8; mesh\.data=-1 takes them all"):
        fit_mesh(run, chips.parse("cpu:8"))


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        ("v5q:4x4x4", "--topology v5q:4x4x4: 'v5q' is no kind of device; did you mean v5p?"),
        ("v5p:4x4", "--topology v5p:4x4: v5p is given as v5p:4x4x4"),
        ("h100:8x2", "--topology h100:8x2: h100 is given as h100:8"),
        ("h100:12", "--topology h100:12: more than 8 GPUs are whole hosts of 8"),
        ("v5p", "--topology v5p: v5p is given as v5p:4x4x4"),
    ],
)
def test_a_wrong_topology_is_told_in_a_line(capsys, topology: str, told: str) -> None:
    code, _, err = plan(capsys, TINY, "--topology", topology)
    assert (code, err) == (USAGE, f"{told}\n")


def test_a_missing_compiler_names_its_extra(capsys, monkeypatch) -> None:
    monkeypatch.setitem(compiling._WHEELS, "tpu", ("no_such_wheel", "tpu"))
    code, _, err = plan(capsys, TINY, "--topology", "v5p:2x2x1")
    assert (code, err) == (NO, "--topology v5p:2x2x1 needs the extra tpu: python3 dev.py setup tpu\n")


def test_a_torus_that_is_whole_sends_both_ways() -> None:
    assert chips.parse("v5p:4x4x8").speed == 2 * chips.parse("v5p:2x2x1").speed
    assert chips.parse("v6e:16x16").speed == 2 * chips.parse("v6e:8x8").speed
    assert chips.parse("h100:16").n_devices == 16


def test_every_peak_is_known() -> None:
    for name, chip in chips.CHIPS.items():
        assert (flops.peak_flops(chip.kind, "bfloat16") is None) == (name == "cpu")


@pytest.mark.slow
def test_an_axis_may_take_a_dimension_of_the_torus_and_a_part_of_another() -> None:
    devices = mesh_on("v5p:4x4x4", data=64).devices.flatten().tolist()
    sizes = {"data": 8, "fsdp": 8, "tensor": 1, "context": 1, "expert": 1}
    assert make_mesh(sizes, devices).devices.shape == (8, 8, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "overrides"),
    [
        ("tiny_causal", "v5p:2x2x2", ("mesh.fsdp=4", "mesh.tensor=2", "mesh.data=1", "model.remat=full")),
        ("tiny_moe", "v5e:2x2", ("mesh.fsdp=2", "mesh.expert=2", "mesh.data=1")),
        # As it is shipped, of few and narrow layers: accumulation between collectives in flight, which a libtpu that is
        # not its JAX's does not compile (0.0.52 beside JAX 0.10).
        ("llama3_8b", "v5p:4x4x4", NARROW),
    ],
)
def test_small_configs_compile_for_tpus(capsys, name: str, topology: str, overrides: tuple[str, ...]) -> None:
    overrides = (*overrides, "model.compute_dtype=bfloat16")
    code, out, err = plan(capsys, str(CONFIGS[name]), *overrides, "--topology", topology, "--json")
    assert code == DONE, err
    told = json.loads(out)
    assert told["fits"] and told["unknown_loops"] == 0
    assert 0 < told["memory"]["needs"] < 1e9 and told["moved_bytes"] > 0
    assert {("fsdp",)} <= {tuple(one["axes"]) for one in told["collectives"]}
    assert all(one["largest_gather"] < told["state"]["weights"]["bytes"] / 2 for one in told["collectives"])
    assert told["step"]["bound"] in told["step"]["seconds"]
    assert 0 < told["step"]["worst"]["mfu"] < told["step"]["best"]["mfu"] < 1


def test_a_libtpu_that_is_not_jaxs_is_told(monkeypatch) -> None:
    (line,) = (line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu"))
    asked = line.removeprefix("libtpu==").partition(".*")[0]
    for installed, told in ((f"{asked}.1", ""), ("9.9.9", f"asks for libtpu {asked}, and this is 9.9.9: ")):
        monkeypatch.setattr(compiling, "versions", lambda it=installed: {"jax": jax.__version__, "libtpu": it})
        assert told in compiling.unmatched() and bool(told) == bool(compiling.unmatched())


@pytest.mark.slow
def test_a_tpus_compiler_tells_what_a_step_would_need() -> None:
    overrides = ["mesh.data=4", "train.batch_rows=32768", "data.seq_len=512", "eval.batch_rows=8"]
    told = make_plan(from_command_line(TINY, overrides), chips.parse("v5e:2x2"), report=lambda _: None)
    assert not told.fits and told.compiled.refused and told.roofline is None
    assert told.compiled.needs is not None and told.missing == told.compiled.needs - told.has > 0
    assert told.compiled.temporaries[0].bytes > 2**30
