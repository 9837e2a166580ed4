"""The FLOPs formula is the arithmetic of the real step, counted in its jaxpr."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.mesh import make_mesh
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.paths import placed
from llm_jax.model.sight import Places, Sight, visible
from llm_jax.model.transformer import abstract_model
from llm_jax.objective.config import CausalConfig, MlmConfig, ObjectiveConfig
from llm_jax.objective.mlm import n_places
from llm_jax.optim.config import AdamWConfig
from llm_jax.plan.arithmetic import product_flops
from llm_jax.run import mesh_sizes
from llm_jax.train import flops
from llm_jax.train.config import MeshConfig
from llm_jax.train.state import abstract_state
from llm_jax.train.step import make_step
from tests.small import SETTINGS, slowly

ROWS, SEQ_LEN = 2, 16
CAUSAL, MLM = CausalConfig(), MlmConfig(rate=0.3)
BASE = ModelConfig(
    d_model=24, d_ff=40, n_layers=3, n_heads=4, n_kv_heads=4, d_head=6, vocab_size=200, attention="xla", remat="none"
)
MOE = MoeConfig(experts=6, top_k=2, d_ff=12, shared_d_ff=20, exchange="all_gather", grouped_matmul="ragged")
MODELS = {
    "swiglu": BASE,
    "grouped queries": BASE.model_copy(update={"n_kv_heads": 2}),
    "one key head": BASE.model_copy(update={"n_kv_heads": 1, "d_head": 8}),
    "gelu": BASE.model_copy(update={"mlp": "gelu"}),
    "tied": BASE.model_copy(update={"tied_embeddings": True}),
    "query and key norms, soft cap": BASE.model_copy(update={"qk_norm": True, "logit_soft_cap": 30.0}),
    "gated gelu, sandwich norms, biases on queries, keys and values": BASE.model_copy(
        update={"mlp": "geglu", "norm_place": "sandwich", "bias": "qkv", "attention_sinks": True}
    ),
    "BERT": BASE.model_copy(
        update={
            "mlp": "gelu_tanh",
            "bias": "all",
            "tied_embeddings": True,
            "embedding_norm": True,
            "token_types": 2,
            "head_transform": True,
            "output_bias": True,
            "learned_positions": SEQ_LEN,
            "norm": "layernorm",
            "norm_bias": True,
            "norm_place": "post",
        }
    ),
    "leading, periods, a remainder": BASE.model_copy(
        update={
            "n_layers": 6,
            "leading": (LayerConfig(attention_norm=False),),
            "period": (LayerConfig(rope_theta=100.0), LayerConfig()),
            "qk_norm": True,
            "qk_norm_over": "all",
            "head_transform": True,
        }
    ),
}
EXPERTS = {
    "experts": BASE.model_copy(update={"leading": (LayerConfig(),), "period": (LayerConfig(moe=True),), "moe": MOE}),
    "plain experts, biases elsewhere": BASE.model_copy(
        update={
            "period": (LayerConfig(moe=True),),
            "moe": MOE.model_copy(update={"shared_d_ff": 0, "balance_rate": 0.01}),
            "bias": "all",
            "mlp": "gelu",
        }
    ),
}


def step_flops(cfg: ModelConfig, objective: ObjectiveConfig = CAUSAL, rows: int = ROWS, accumulation: int = 1) -> float:
    """The step's FLOPs, from the jaxpr of the function that the loop jits."""
    optim, mesh = AdamWConfig(), make_mesh(mesh_sizes(MeshConfig(data=1), 1))
    rows_ABU = jax.ShapeDtypeStruct((accumulation, rows // accumulation, SEQ_LEN + 1), jnp.int32)
    with jax.set_mesh(mesh):
        step = make_step(cfg, objective, optim, **SETTINGS, steps=10)
        return product_flops(
            jax.make_jaxpr(step)(placed(abstract_state(cfg, optim), mesh), placed(rows_ABU, mesh)).jaxpr
        )


# Between them these have every part of a model; a trace takes a second, and what others show beside them is slow.
OFTEN = (
    "grouped queries",
    "gated gelu, sandwich norms, biases on queries, keys and values",
    "BERT",
    "leading, periods, a remainder",
)


@pytest.mark.parametrize("name", [name if name in OFTEN else slowly(name) for name in MODELS])
def test_the_formula_is_the_steps_own_arithmetic(name: str) -> None:
    cfg = MODELS[name]
    assert step_flops(cfg) == ROWS * SEQ_LEN * flops.flops_per_token(cfg, SEQ_LEN, CAUSAL).full


@pytest.mark.parametrize("name", [slowly("swiglu"), "BERT"])
def test_the_head_counts_as_often_as_something_is_predicted(name: str) -> None:
    per_token = flops.flops_per_token(MODELS[name], SEQ_LEN, MLM)
    assert step_flops(MODELS[name], MLM) == pytest.approx(ROWS * SEQ_LEN * per_token.full, rel=1e-12)
    assert per_token.full < flops.flops_per_token(MODELS[name], SEQ_LEN, CAUSAL).full
    assert per_token.visible == per_token.full


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("experts", CAUSAL),
        ("plain experts, biases elsewhere", MLM),
        slowly("experts", MLM),
        slowly("plain experts, biases elsewhere", CAUSAL),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_experts_count_where_they_are_chosen(name: str, objective: ObjectiveConfig) -> None:
    cfg = EXPERTS[name]
    per_token = flops.flops_per_token(cfg, SEQ_LEN, objective)
    assert step_flops(cfg, objective) == pytest.approx(ROWS * SEQ_LEN * per_token.full, rel=1e-12)


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.1, 0.29])
@pytest.mark.parametrize("T", [16, 20, 40, 100, 512])
def test_predicted_positions_are_those_that_the_batch_has_room_for(rate: float, T: int) -> None:
    per_token = flops.flops_per_token(BASE, T, MlmConfig(rate=rate)).weights
    whole = flops.flops_per_token(BASE, T, CAUSAL).weights
    head = 6 * BASE.padded_vocab_size * BASE.d_model
    assert (whole - per_token) / head == pytest.approx(1 - n_places(rate, T, 1) / T, rel=1e-12)


def test_the_formula_holds_for_accumulated_steps() -> None:
    assert step_flops(BASE, rows=4, accumulation=2) == 4 * SEQ_LEN * flops.flops_per_token(BASE, SEQ_LEN, CAUSAL).full


def test_recomputation_is_seen_by_the_count_and_not_by_the_formula() -> None:
    recomputing = BASE.model_copy(update={"remat": "full"})
    assert flops.flops_per_token(recomputing, SEQ_LEN, CAUSAL) == flops.flops_per_token(BASE, SEQ_LEN, CAUSAL)
    assert step_flops(recomputing) > step_flops(BASE)


def test_a_causal_mask_halves_the_stricter_conventions_attention_only() -> None:
    per_token = flops.flops_per_token(BASE, SEQ_LEN, CAUSAL)
    assert per_token.full - per_token.visible == per_token.attention / 2


@pytest.mark.parametrize("objective", [CAUSAL, MLM], ids=["causal", "mlm"])
@pytest.mark.parametrize(
    ("layer", "global_tokens"),
    [
        (LayerConfig(), 0),
        (LayerConfig(window=16), 0),
        (LayerConfig(window=64), 0),
        (LayerConfig(block=32), 0),
        (LayerConfig(block=16), 4),
        (LayerConfig(window=1000), 0),
    ],
)
def test_attention_counts_what_is_in_reach_and_what_is_seen(
    layer: LayerConfig, global_tokens: int, objective: ObjectiveConfig
) -> None:
    """Against the mask itself: in reach is what the query that sees most sees; at the edges of a row some see less."""
    T, causal = 256, objective is CAUSAL
    cfg = BASE.model_copy(update={"period": (layer,), "n_layers": 1, "global_tokens": global_tokens})
    t_T = jnp.arange(T)
    row = Places(jnp.zeros((1, T), jnp.int32), t_T[None])
    sight = Sight(causal, layer.window, layer.block, global_tokens)
    seen_T = np.asarray(visible(row, row, t_T, t_T, sight))[0].sum(axis=1)
    per_key = 12 * cfg.n_heads * cfg.d_head
    counted = flops.flops_per_token(cfg, T, objective)
    assert counted.attention == per_key * np.sort(seen_T)[-1 - global_tokens]
    assert counted.visible_attention == pytest.approx(per_key * seen_T.mean(), rel=0.15)


def test_a_window_counts_less_than_the_step_computes_with_the_reference_backend() -> None:
    local = BASE.model_copy(update={"period": (LayerConfig(window=4), LayerConfig(), LayerConfig(window=4))})
    with_window, without = (flops.flops_per_token(cfg, SEQ_LEN, CAUSAL) for cfg in (local, BASE))
    assert step_flops(local) == ROWS * SEQ_LEN * without.full
    assert with_window.weights == without.weights
    assert with_window.attention == without.attention * (1 + 2 * 4 / SEQ_LEN) / 3


@pytest.mark.parametrize("name", [*MODELS, *EXPERTS])
def test_parameters_are_those_of_the_model(name: str) -> None:
    cfg = (MODELS | EXPERTS)[name]
    with jax.set_mesh(make_mesh(mesh_sizes(MeshConfig(data=1), 1))):
        params = abstract_model(cfg).params
    assert flops.parameters(cfg) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_papers_count_no_padding() -> None:
    for name, rows in {"swiglu": 2, "tied": 1}.items():
        padding = (256 - 200) * BASE.d_model * rows
        assert flops.parameters(MODELS[name]) - flops.parameters(MODELS[name], padded=False) == padding
    bert = MODELS["BERT"]
    assert flops.parameters(bert) - flops.parameters(bert, padded=False) == 56 * (BASE.d_model + 1)


def test_a_token_uses_the_experts_that_it_chooses() -> None:
    for name, cfg in EXPERTS.items():
        fewer = cfg.model_copy(update={"moe": cfg.moe and cfg.moe.model_copy(update={"experts": 2})})
        router = cfg.n_moe_layers * cfg.d_model * (6 - 2)
        assert flops.active_parameters(cfg) == flops.parameters(fewer) + router, name
    assert flops.active_parameters(BASE) == flops.parameters(BASE)


def test_a_share_of_the_peak_counts_every_device() -> None:
    per_token = flops.flops_per_token(BASE, SEQ_LEN, CAUSAL)
    peak = flops.peak_flops("TPU v4", "bfloat16")
    assert peak == 275e12
    at_peak = 8 * 275e12 / per_token.full
    assert flops.mfu(at_peak, per_token, peak, n_devices=8) == pytest.approx(1)
    assert flops.mfu(at_peak / 4, per_token, peak, n_devices=8) == pytest.approx(0.25)


def test_without_a_known_peak_there_is_no_share() -> None:
    assert flops.peak_flops("cpu", "float32") is None
    assert flops.mfu(1e6, flops.flops_per_token(BASE, SEQ_LEN, CAUSAL), None, 1) is None


def test_float32_runs_in_tf32_on_gpus_and_in_bfloat16_on_tpus() -> None:
    assert flops.peak_flops("NVIDIA H200", "float32") == 989e12 / 2
    assert flops.peak_flops("TPU v5p", "float32") == flops.peak_flops("TPU v5", "bfloat16") == 459e12
