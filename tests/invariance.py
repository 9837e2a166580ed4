"""The matrix of the invariance proof: which models, objectives, meshes, accumulations and remats, and how far apart."""

import functools
import itertools
import unittest.mock
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from llm_jax.batch import row_keys
from llm_jax.data.config import PAD_ID
from llm_jax.model import moe
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.paths import placed
from llm_jax.model.transformer import Weights, abstract_model
from llm_jax.objective import loss as objectives
from llm_jax.objective.config import CausalConfig, MlmConfig, ObjectiveConfig
from llm_jax.train.step import divide, gradient_sums
from tests.small import CFG, SETTINGS, U, deviation, mesh_of, put, ragged_rows, weights_of

MODELS = {
    "dense": CFG,
    "experts": CFG.model_copy(
        update={
            "n_layers": 3,
            "leading": (LayerConfig(),),
            "period": (LayerConfig(moe=True),),
            "moe": MoeConfig(
                experts=8,
                top_k=2,
                d_ff=16,
                shared_d_ff=8,
                load_balance=0.3,
                router_z=0.2,
                balance_rate=0.01,
                exchange="all_to_all",
                grouped_matmul="blocked",
            ),
        }
    ),
    "local/global": CFG.model_copy(
        update={
            "n_layers": 3,
            "period": (LayerConfig(window=8, rope_theta=100.0), LayerConfig()),
        }
    ),
}
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "causal": CausalConfig(z_loss=1e-2),
    "mlm": MlmConfig(rate=0.3, unit="word", z_loss=1e-2),
}
MESHES: dict[str, dict[str, int]] = {
    "1": {},
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4 x fsdp 2": {"tensor": 4, "fsdp": 2},
    "context 2 x fsdp 4": {"context": 2, "fsdp": 4},
    "expert 4 x fsdp 2": {"expert": 4, "fsdp": 2},
    "data 2 x fsdp 2 x expert 2": {"data": 2, "fsdp": 2, "expert": 2},
}
ACCUMULATIONS = (1, 4)
REMATS = ("none", "full")
TOLERANCE = 1e-5
# Where two scores are nearer than this, another order of additions may choose another expert.
NEAREST = 1e-4
ROWS = 32


class Setting(NamedTuple):
    """One row of the matrix."""

    model: str
    objective: str
    mesh: str
    accumulation: int
    remat: str


def matrix() -> Sequence[Setting]:
    """Every mesh with every model and objective, accumulation and remat in turn; and once more where it is hardest."""
    cells = list(itertools.product(MESHES, MODELS, OBJECTIVES))
    turns = list(itertools.product(ACCUMULATIONS, REMATS))
    # 3 is prime to 4, and shifts the turn from mesh to mesh: every pair of settings occurs, which a test counts.
    settings = [
        Setting(model, objective, mesh, *turns[(i + i // 6) * 3 % 4])
        for i, (mesh, model, objective) in enumerate(cells)
    ]
    return list(dict.fromkeys([*settings, *hardest()]))


def hardest() -> Sequence[Setting]:
    """Where most can go wrong: microbatches over parts of rows, experts on several devices, rows on as many."""
    settings = [
        Setting(model, objective, "context 2 x fsdp 4", 4, "full")
        for model, objective in itertools.product(MODELS, OBJECTIVES)
    ]
    settings += [Setting("experts", objective, "expert 4 x fsdp 2", 4, "full") for objective in OBJECTIVES]
    return [*settings, *(Setting(model, "mlm", "data 8", 4, "none") for model in MODELS)]


def sample() -> Sequence[Setting]:
    """The hardest settings, and others until every pair occurs: always one that has most of the pairs missing."""
    settings, taken = matrix(), list(hardest())
    missing = set().union(*map(pairs, settings)).difference(*map(pairs, taken))
    while missing:
        taken.append(max(settings, key=lambda setting: len(pairs(setting) & missing)))
        missing -= pairs(taken[-1])
    return taken


def pairs(setting: Setting) -> set[tuple[tuple[str, object], ...]]:
    """Every two values that the setting brings together, each with the name of its field."""
    return set(itertools.combinations(setting._asdict().items(), 2))


class Outcome(NamedTuple):
    """What one setting computes: all of numpy."""

    loss: dict[str, np.ndarray]
    """Every reported mean."""
    gradient: Any
    chosen: dict[str, np.ndarray]
    """The chosen experts by the layers' place, sorted, [L, rows, T, X]; of padding -1."""
    loads: dict[str, np.ndarray]


class Difference(NamedTuple):
    """How far a setting is from one device."""

    experts: int
    """Tokens that chose other experts."""
    loss: float
    """The worst of all reported means, relative or absolute, whichever is less."""
    gradient: float
    """The worst leaf, as `deviation` measures it."""


@functools.cache
def rows() -> np.ndarray:
    """int32 [ROWS, U], ragged, the emptiest first: microbatches and devices weigh very differently."""
    rows_BU = np.concatenate([ragged_rows(seed) for seed in range(ROWS // 8)])
    return rows_BU[np.argsort(np.sum(rows_BU != PAD_ID, axis=1), kind="stable")]


def outcome(setting: Setting) -> Outcome:
    """The gradient and the means of one batch, by the functions that the step is made of."""
    cfg = config_of(setting)
    objective = OBJECTIVES[setting.objective]
    mesh = mesh_of(**MESHES[setting.mesh])
    A = setting.accumulation
    with jax.set_mesh(mesh):
        weights = put_all(cfg, mesh)
        rows_ABU = put(rows().reshape(A, ROWS // A, U), "ABU", mesh)
        computed = jax.jit(make_gradient(cfg, objective))(weights, rows_ABU)
        loss, gradient, chosen, loads = jax.device_get(computed)
    flat = {name: np.concatenate(list(of_A), axis=1) for name, of_A in chosen.items()}
    return Outcome(loss, gradient, flat, loads)


def make_gradient(cfg: ModelConfig, objective: ObjectiveConfig) -> Any:
    """The function (weights, rows_ABU) -> means, gradient, chosen experts of each microbatch, loads."""

    def gradient_of(weights: Weights, rows_ABU: Array) -> tuple[Any, ...]:
        # Read from the modules at the time of tracing, so that a planted defect is met.
        keys_AB = row_keys(jax.random.key(5), 0, *rows_ABU.shape[:2])
        words_V, crosses = SETTINGS["word_starts_V"], SETTINGS["cross_documents"]
        batch_A = objectives.make_batch(rows_ABU, keys_AB, objective, words_V, cross_documents=crosses)
        totals = objectives.weights(batch_A, cfg)
        gradient, statistics, loads = gradient_sums(*weights, batch_A, totals, cfg, objective)
        means = {name: divide(value, totals[name]) for name, value in statistics.items()}
        return means, gradient, chosen_experts(weights, batch_A, cfg, objective), loads

    return gradient_of


def chosen_experts(weights: Weights, batch_A: Any, cfg: ModelConfig, objective: ObjectiveConfig) -> dict[str, Array]:
    """The experts that each token chose, in ascending order, [A, L, B, T, X] by place; empty for a dense model."""
    if cfg.moe is None:
        return {}
    model = nnx.merge(abstract_model(cfg).graph, *weights)

    def of(batch: Any) -> dict[str, Array]:
        causal = objective.name == "causal"
        _, routing = model(batch.tokens_BT, batch.segments_BT, batch.positions_BT, cfg, causal=causal)
        return {name: jnp.sort(place.experts_LBTX, axis=-1) for name, place in routing.items()}

    return jax.lax.scan(lambda _, batch: (None, of(batch)), None, batch_A)[1]


def difference(one: Outcome, reference: Outcome) -> Difference:
    """How far apart two outcomes are; experts first, since another expert is another function."""
    experts = sum(int(np.any(one.chosen[name] != reference.chosen[name], axis=-1).sum()) for name in reference.chosen)
    losses = [
        abs(float(one.loss[name]) - float(value)) / max(1.0, abs(float(value)))
        for name, value in reference.loss.items()
    ]
    return Difference(experts, max(losses), deviation(one.gradient, reference.gradient))


@functools.cache
def one_device(model: str, objective: str) -> Outcome:
    """What all others are held against: one device, one microbatch, nothing recomputed."""
    return outcome(Setting(model, objective, "1", 1, "none"))


def nearest_scores(objective: str) -> float:
    """The least gap, over tokens and layers, between the last chosen expert and the first that was not."""
    cfg, gaps = MODELS["experts"], []
    assert cfg.moe is not None
    k, choose = cfg.moe.top_k, moe.choose

    def watched(scores_BTE: Array, bias_E: Array | None, settings: MoeConfig) -> Any:
        assert bias_E is not None
        ranked_BTE = jnp.sort(scores_BTE + bias_E[None, None], axis=-1)
        jax.debug.callback(lambda gap: gaps.append(float(gap)), jnp.min(ranked_BTE[..., -k] - ranked_BTE[..., -k - 1]))
        return choose(scores_BTE, bias_E, settings)

    mesh = mesh_of()
    with jax.set_mesh(mesh), unittest.mock.patch.object(moe, "choose", watched):
        rows_ABU = put(rows()[None], "ABU", mesh)
        compute = jax.jit(make_gradient(cfg, OBJECTIVES[objective]))
        jax.block_until_ready(compute(put_all(cfg, mesh), rows_ABU))
    jax.effects_barrier()
    assert gaps
    return min(gaps)


def config_of(setting: Setting) -> ModelConfig:
    """The model's config under the setting."""
    return MODELS[setting.model].model_copy(update={"remat": setting.remat})


def put_all(cfg: ModelConfig, mesh: Any) -> Weights:
    """The same weights for every mesh, and choice biases that differ from expert to expert."""
    parts = abstract_model(cfg)
    # A router that is surer of itself, and the seed: so no choice is so close that rounding decides.
    drawn = jax.tree_util.tree_map_with_path(lambda path, x: 2 * x if "router" in str(path) else x, weights_of(cfg))
    params = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), drawn, placed(parts.params, mesh))
    rng = np.random.default_rng(37)
    balance = jax.tree.map(
        lambda at: jax.device_put(rng.normal(0, 0.05, at.shape).astype(np.float32), at.sharding),
        placed(parts.balance, mesh),
    )
    return params, balance
