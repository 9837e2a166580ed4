"""Schedules at their borders, decay by letters, clipping, and updates that are skipped without a trace in the state."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.config import ConfigError
from llm_jax.data.config import PAD_ID
from llm_jax.model.weights import Weight, matrices
from llm_jax.objective import loss as objectives
from llm_jax.objective.config import CausalConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.optim.optimizer import clip_scale, learning_rate
from llm_jax.train import state as state_module
from llm_jax.train import step as step_module
from llm_jax.train.state import TrainState, init_state, with_weights
from llm_jax.train.step import divide, make_step
from tests.small import CFG, SETTINGS, B, U, mesh_of, put, put_weights, ragged_rows, slowly, weights_of

PEAK = 0.5


def rates(steps: int, **fields) -> list[float]:
    """The learning rate of each of `steps` updates."""
    cfg = AdamWConfig(lr=PEAK, **fields)
    cfg.check(steps)
    return np.asarray(jax.jit(lambda t: learning_rate(cfg, t, steps))(jnp.arange(steps))).tolist()


def test_constant_is_the_peak_from_first_to_last():
    assert rates(5, schedule="constant") == [PEAK] * 5


def test_warm_up_rises_by_equal_parts_to_the_peak_at_its_last_update():
    for schedule in ("constant", "linear", "cosine", "wsd"):
        decay = {"decay_steps": 3} if schedule == "wsd" else {}
        assert rates(12, schedule=schedule, warmup_steps=4, **decay)[:5] == pytest.approx(
            [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK]
        )
    assert rates(3, warmup_steps=1)[0] == PEAK
    assert rates(4, warmup_steps=4) == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_linear_and_cosine_start_at_the_peak_and_end_at_their_share(schedule):
    got = rates(11, schedule=schedule, final_lr_share=0.2)
    assert got[0] == PEAK and got[-1] == pytest.approx(PEAK * 0.2)
    assert got[5] == pytest.approx(PEAK * 0.6)
    assert all(a > b for a, b in itertools.pairwise(got))
    warm = rates(15, schedule=schedule, final_lr_share=0.2, warmup_steps=4)
    assert warm[4:] == pytest.approx(got)
    assert rates(9, schedule=schedule, final_lr_share=0.0)[-1] == pytest.approx(0, abs=1e-8)


def test_cosine_is_a_cosine_and_linear_is_a_line():
    line, wave = (rates(101, schedule=schedule, final_lr_share=0.0) for schedule in ("linear", "cosine"))
    assert line == pytest.approx([PEAK * (1 - i / 100) for i in range(101)], abs=1e-6)
    assert wave == pytest.approx([PEAK * (0.5 + 0.5 * math.cos(math.pi * i / 100)) for i in range(101)], abs=1e-6)


def test_wsd_is_stable_until_its_decay_which_ends_at_the_last_update():
    got = rates(20, schedule="wsd", warmup_steps=5, decay_steps=5, final_lr_share=0.0)
    assert got[5:15] == [PEAK] * 10
    assert got[15:] == pytest.approx([PEAK * share for share in (0.8, 0.6, 0.4, 0.2, 0.0)], abs=1e-7)
    assert rates(8, schedule="wsd") == pytest.approx([PEAK] * 8)
    assert rates(6, schedule="wsd", warmup_steps=3, decay_steps=3, final_lr_share=0.1)[2:] == pytest.approx(
        [PEAK, PEAK * 0.7, PEAK * 0.4, PEAK * 0.1]
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_run_of_one_update_has_a_rate(schedule):
    assert rates(1, schedule=schedule) == [PEAK]
    assert rates(1, schedule=schedule, warmup_steps=1) == [PEAK]


def test_after_the_last_update_the_rate_stays():
    cfg = AdamWConfig(lr=PEAK, final_lr_share=0.25)
    beyond = jax.jit(lambda t: learning_rate(cfg, t, 10))(jnp.asarray([9, 10, 500]))
    assert np.asarray(beyond).tolist() == pytest.approx([PEAK / 4] * 3)


def test_schedules_that_do_not_fit_are_told():
    with pytest.raises(
        ConfigError, match=r"optim.warmup_steps \+ optim.decay_steps = 12 is more than train.steps = 10"
    ):
        AdamWConfig(warmup_steps=6, decay_steps=6, schedule="wsd").check(10)
    with pytest.raises(ConfigError, match=r"optim.decay_steps is for optim.schedule=wsd; the schedule is cosine"):
        AdamWConfig(decay_steps=6).check(10)


@pytest.mark.parametrize(
    ("norm", "limit", "scale"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (9.0, None, 1.0)]
)
def test_clipping_scales_down_to_the_limit_and_never_up(norm, limit, scale):
    assert float(clip_scale(jnp.float32(norm), AdamWConfig(clip_norm=limit))) == scale


def test_divide_by_no_weight_is_nothing():
    assert [float(divide(jnp.float32(a), jnp.float32(b))) for a, b in ((6, 3), (0, 0))] == [2, 0]


# Updates of the real step.


# One plain layer: what the update does to it is what it does to any.
PLAIN = CFG.model_copy(update={"n_layers": 1, "mlp": "gelu", "logit_soft_cap": None, "attention": "xla"})


class Trainer:
    """A compiled step on a mesh, and a state to start from."""

    def __init__(self, optim: AdamWConfig, mesh: dict[str, int] | None = None, steps: int = 10):
        self.devices = mesh_of(**(mesh or {}))
        with jax.set_mesh(self.devices):
            start = jax.jit(lambda params: with_weights(params, nnx.State({}), optim))
            self.state = start(put_weights(weights_of(PLAIN), PLAIN, self.devices))
            step = make_step(PLAIN, CausalConfig(), optim, **SETTINGS, steps=steps)
            self.step = jax.jit(step)

    def __call__(self, state: TrainState, rows: np.ndarray) -> tuple[TrainState, dict[str, np.ndarray]]:
        with jax.set_mesh(self.devices):
            state, metrics = self.step(state, put(rows[None], "ABU", self.devices))
            return state, jax.device_get(metrics)


OPTIM = AdamWConfig(lr=0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, clip_norm=0.5, warmup_steps=2)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(OPTIM)


@pytest.fixture(scope="module")
def unclipped() -> Trainer:
    """Adam's first moment after an update is its gradient, and nothing is decayed."""
    return Trainer(AdamWConfig(lr=0.01, b1=0.0, b2=0.95, weight_decay=0.0, clip_norm=None, warmup_steps=2))


def leaves(tree) -> dict[str, np.ndarray]:
    named = jax.tree.leaves_with_path(nnx.to_pure_dict(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in named}


def adamw_by_hand(gradients: list[dict[str, np.ndarray]], start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """OPTIM in float64: clipped by the global norm, decoupled decay of all but the norms' scales."""
    weights = {name: x.astype(np.float64) for name, x in start.items()}
    first, second = ({name: np.zeros(x.shape) for name, x in start.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradient.values()))
        rate = OPTIM.lr * t / 2
        for name, g in gradient.items():
            g = g.astype(np.float64) * min(1, 0.5 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            direction = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-8)
            decay = 0.0 if "norm" in name else 0.3
            weights[name] = weights[name] - rate * (direction + decay * weights[name])
    return weights


def wrongness(trainer: Trainer, unclipped: Trainer) -> float:
    """How far two updates are from those by hand, at worst, as a share of the learning rate."""
    state, gradients = trainer.state, []
    for seed in (0, 1):
        alone = dataclasses.replace(unclipped.state, params=state.params)
        gradients.append(leaves(unclipped(alone, ragged_rows(seed))[0].opt_state[0].mu))
        state, told = trainer(state, ragged_rows(seed))
        norm = math.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients[-1].values()))
        assert told["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.5
        assert told["lr"] == pytest.approx(OPTIM.lr * (seed + 1) / 2)
    expected = adamw_by_hand(gradients, leaves(trainer.state.params))
    # Where a gradient is next to nothing its direction is rounding.
    sure = {name: np.all([np.abs(g[name]) > 1e-6 for g in gradients], axis=0) for name in expected}
    return max(np.max(np.abs(x - expected[name])[sure[name]]) for name, x in leaves(state.params).items()) / OPTIM.lr


def test_an_update_is_adamw_written_by_hand(trainer, unclipped):
    assert wrongness(trainer, unclipped) < 1e-3


def vectors_decay_too(monkeypatch):
    for module in (state_module, step_module):
        monkeypatch.setattr(module, "matrices", lambda params: jax.tree.map(lambda w: True, params, is_leaf=is_weight))


def never_clipped(monkeypatch):
    monkeypatch.setattr(step_module, "clip_scale", lambda norm, cfg: jnp.ones_like(norm))


def is_weight(x) -> bool:
    return isinstance(x, Weight)


@pytest.mark.parametrize("plant", [slowly(vectors_decay_too), never_clipped])
def test_planted_defect_of_the_update_is_seen(plant, unclipped, monkeypatch):
    plant(monkeypatch)
    assert wrongness(Trainer(OPTIM), unclipped) > 0.01


def test_what_has_no_gradient_is_decayed_if_it_is_a_matrix_and_stays_if_it_is_a_vector(trainer):
    """A batch of padding has no gradient at all: what moves is decay alone."""
    before = leaves(trainer.state.params)
    state, told = trainer(trainer.state, np.full((B, U), PAD_ID, np.int32))
    assert told["finite"] and told["loss"] == told["grad_norm"] == told["tokens"] == 0
    for name, value in leaves(state.params).items():
        if "norm" in name:
            np.testing.assert_array_equal(value, before[name], err_msg=name)
        else:
            np.testing.assert_allclose(value, before[name] * (1 - 0.005 * 0.3), rtol=1e-6, err_msg=name)


def test_matrices_are_what_is_drawn():
    with jax.set_mesh(mesh_of()):
        told = leaves(matrices(jax.eval_shape(lambda: init_state(PLAIN, OPTIM, 0)).params))
    vectors = {name for name, is_matrix in told.items() if not is_matrix}
    of_a_layer = ("attention_norm/scale", "mlp_norm/scale", "attention/q_norm", "attention/k_norm")
    assert vectors == {"norm/scale", *(f"layers/0+1/{name}" for name in of_a_layer)}
    assert len(told) == len(vectors) + 8


def bytes_of(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def poisoned(state: TrainState, value: float) -> TrainState:
    """The state with one number of one weight replaced."""
    embed: Any = state.params["embed"]
    weights = jax.tree.map(lambda x: x, state.params)
    weights["embed"] = embed.replace(embed.get_value().at[7, 3].set(value))
    return dataclasses.replace(state, params=weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_update_leaves_weights_and_optimizer_bit_for_bit_and_is_counted(value, trainer):
    healthy, _ = trainer(trainer.state, ragged_rows(1))
    sick = poisoned(healthy, value)
    rows = ragged_rows(0)
    rows[:, 1] = 7
    after, told = trainer(sick, rows)
    assert not told["finite"] and told["skipped"] == 1
    assert bytes_of(after.params) == bytes_of(sick.params)
    assert bytes_of(after.opt_state) == bytes_of(sick.opt_state)
    assert (int(after.step), int(after.batch_index), int(after.skipped)) == (2, 2, 1)
    again, told = trainer(after, rows)
    assert told["skipped"] == 2 and int(again.step) == 3
    well, told = trainer(dataclasses.replace(again, params=healthy.params), rows)
    assert told["finite"] and told["skipped"] == 2
    assert bytes_of(well.params) != bytes_of(healthy.params)


@pytest.mark.slow
def test_a_gradient_that_overflows_while_the_loss_is_finite_is_skipped(trainer, monkeypatch):
    real = objectives.sums

    def steep(model, batch, cfg, objective):
        losses, *others = real(model, batch, cfg, objective)
        return {name: value * 1e38 * 10 for name, value in losses.items()}, *others

    monkeypatch.setattr(objectives, "sums", steep)
    broken = Trainer(OPTIM)
    after, told = broken(broken.state, ragged_rows(0))
    assert np.isfinite(told["loss"]) and not np.isfinite(told["grad_norm"])
    assert not told["finite"] and told["skipped"] == 1
    assert bytes_of(after.params) == bytes_of(broken.state.params)
    assert bytes_of(after.opt_state) == bytes_of(broken.state.opt_state)


def test_planted_update_that_is_not_skipped_is_seen(trainer, monkeypatch):
    monkeypatch.setattr(jnp, "isfinite", lambda x: jnp.ones_like(x, bool))
    careless = Trainer(OPTIM)
    after, told = careless(poisoned(careless.state, math.nan), ragged_rows(0))
    assert told["finite"]
    assert bytes_of(after.params) != bytes_of(poisoned(careless.state, math.nan).params)


def test_the_learning_rate_follows_the_step_also_past_a_skipped_update(trainer):
    state, rates_told = poisoned(trainer.state, math.nan), []
    rows = ragged_rows(0)
    rows[:, 1] = 7
    for _ in range(3):
        state, told = trainer(state, rows)
        rates_told.append(float(told["lr"]))
    assert rates_told == pytest.approx([0.005, 0.01, 0.01])


def test_the_optimizer_runs_on_a_mesh_and_its_state_is_sharded_as_the_weights():
    sharded = Trainer(OPTIM, {"fsdp": 2, "tensor": 4})
    state = sharded(sharded.state, ragged_rows(0))[0]
    for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
        types = jax.tree.map(lambda x: x.sharding, moments)
        assert jax.tree.leaves(types) == jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state.params))
