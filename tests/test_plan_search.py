"""`llm-jax plan --search`: every layout that it looks at can be run, and estimates follow what layouts change."""

import math

import pytest

from llm_jax.config import load, override
from llm_jax.plan import chips, search, search_page
from llm_jax.plan.account import leaves
from llm_jax.plan.expected import expected
from llm_jax.plan.memory import kept, products, room
from llm_jax.plan.plan import fit_mesh
from llm_jax.run import Run, check, from_command_line, mesh_sizes
from llm_jax.train.flops import flops_per_token
from tests.test_configs import CONFIGS

TINY = str(CONFIGS["tiny_causal"])
SMALL = ["model.d_model=32", "model.d_ff=48", "model.n_layers=2", "data.seq_len=64", "mesh.data=-1", "mesh.fsdp=8"]
CPUS = chips.parse("cpu:8")


def test_every_layout_can_be_run_on_all_devices() -> None:
    run = from_command_line(TINY, SMALL)
    found = list(search.layouts(run, CPUS, search.Scales()))
    assert len(found) > 100 and len({layout.overrides for layout in found}) == len(found)
    for layout in found:
        changed = override(run, layout.overrides)
        check(changed)
        assert fit_mesh(changed, CPUS) == layout.axes
    assert all(run.model.n_kv_heads % layout.axes["tensor"] == 0 for layout in found)
    assert {layout.axes["expert"] for layout in found} == {1}
    assert {layout.run.model.remat for layout in found} == {*search.POLICIES}


def test_estimates_follow_what_is_recomputed_and_sent() -> None:
    run = load(CONFIGS["llama3_8b"], Run)
    run = run.model_copy(update={"model": run.model.model_copy(update={"attention": "xla"})})
    slow = frozenset[str]()

    def of(run: Run, **sizes: int):
        axes = mesh_sizes(run.mesh.model_copy(update=sizes), 64)
        return expected(run, axes, [x for x in leaves(run, axes) if x.kind == "weights"], slow)

    def recomputing(remat: str | tuple[str, ...]) -> Run:
        return run.model_copy(update={"model": run.model.model_copy(update={"remat": remat})})

    formula = run.tokens_per_step * flops_per_token(run.model, 8192, run.objective).full
    all_kept, elementwise, dots, some, full = (of(recomputing(policy)).flops for policy in search.POLICIES)
    assert formula == all_kept < elementwise == dots < some < full < 4 / 3 * formula
    # Backends other than xla leave what their backward pass wants.
    with_kernel = {
        policy: override(recomputing(policy), ("model.attention=splash",)) for policy in ("elementwise", "dots")
    }
    assert of(with_kernel["elementwise"]).flops < of(with_kernel["dots"]).flops
    # Weights go over fsdp once for each microbatch and pass; over data only their gradients do.
    gathers = {n: next(c for c in of(run, fsdp=n).collectives if c.kind == "all-gather").payload for n in (4, 8, 16)}
    assert gathers[4] == gathers[8] == gathers[16] == pytest.approx(4 * 2 * 2 * 8.03e9, rel=0.01)
    assert not any(c.sent for c in of(run, fsdp=1).collectives if c.kind == "all-gather")


def test_buffers_of_experts_have_room_for_the_worst_routing() -> None:
    mixtral, olmoe = (load(CONFIGS[name], Run).model for name in ("mixtral_8x7b", "olmoe_1b_7b"))
    assert [room(mixtral, {"expert": n}) for n in (1, 2, 8)] == [2, 4, 8]
    assert [room(olmoe, {"expert": n}) for n in (1, 8)] == [8, 64]
    assert kept(mixtral) == frozenset() and products(mixtral)["mlp_up"] == 2 * 14_336


def test_what_is_shown_can_be_pasted_into_a_shell() -> None:
    run = from_command_line(TINY, SMALL)
    changes = ("mesh.fsdp=4", 'model.remat=["q","k"]')
    layout = search.Layout(changes, {"data": 2, "fsdp": 4}, override(run, changes), None, None, None)
    assert search.told(layout) == 'mesh.fsdp=4 \'model.remat=["q","k"]\''
    assert search_page.row(layout) == ["data 2 x fsdp 4", "q, k", "1", "estimated", "not said"]
    assert layout.cost == math.inf
