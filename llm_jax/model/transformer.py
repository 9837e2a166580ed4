"""The transformer: a vocabulary-parallel embedding, layers of which whole periods run in one scan, an output head."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llm_jax.data.config import PAD_ID
from llm_jax.mesh import acts, gathered, weights
from llm_jax.model.config import LayerConfig, ModelConfig, Place
from llm_jax.model.layers import Block, Rows, rematerialised
from llm_jax.model.moe import Routing
from llm_jax.model.norms import Norm
from llm_jax.model.rope import Angles, angles
from llm_jax.model.sight import Places
from llm_jax.model.weights import Balance, Weight, in_turn, matrix, plus, project, stored, whole, zeros


class HeadTransform(nnx.Module):
    """What BERT's hidden states pass before the output head: a dense layer, GELU and a norm (Devlin et al. 2018)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        dims = cfg.dims | {"O": cfg.d_model}
        self.dense = matrix("DO", dims, rngs, fan_in="D")
        self.dense_bias = zeros("O", dims) if cfg.bias == "all" else None
        self.norm = Norm(cfg)

    def __call__(self, x_BND: Array, cfg: ModelConfig) -> Array:
        """Hidden states in and out, [B, N, D] or [B, T, D]."""
        x_BND, dense_DO = in_turn(x_BND, stored(self.dense, cfg))
        x_BNO = plus(project("BTD,DO->BTO", x_BND, dense_DO), self.dense_bias)
        return self.norm(jax.nn.gelu(x_BNO, approximate=False), cfg)


class Head(NamedTuple):
    """What makes logits of hidden states; padded rows of the vocabulary included."""

    unembed_VD: Array
    """In the compute type, as it is stored."""
    bias_V: Array | None = None
    """Float32, sharded over tensor."""
    transform: HeadTransform | None = None
    """What hidden states pass first."""


class Transformer(nnx.Module):
    """The model as an immutable tree of weights; layers by the names of their places, those of a scan stacked (L)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.embed = matrix("VD", cfg.dims, rngs, fan_in="D")
        # A layer's key depends on its number alone, so that another spelling of the same layers starts alike.
        keys_L = jax.random.split(rngs.params(), cfg.n_layers)
        scanned = {place.name: _stacked(cfg, place, keys_L) for place in cfg.period_places}
        alone = {
            place.name: Block(cfg, place.layer, nnx.Rngs(params=keys_L[place.first]))
            for place in (*cfg.leading_places, *cfg.remaining_places)
        }
        self.layers = nnx.Dict(scanned | alone)
        self.norm = Norm(cfg) if cfg.norm_place != "post" else None
        if not cfg.tied_embeddings:
            self.unembed = matrix("VD", cfg.dims, rngs, fan_in="D")
        positions, types = {"P": cfg.learned_positions}, {"Y": cfg.token_types}
        self.positions = matrix("PD", cfg.dims | positions, rngs, fan_in="D") if cfg.learned_positions else None
        self.types = matrix("YD", cfg.dims | types, rngs, fan_in="D") if cfg.token_types else None
        self.embedding_norm = Norm(cfg) if cfg.embedding_norm else None
        self.head_transform = HeadTransform(cfg, rngs) if cfg.head_transform else None
        self.output_bias = zeros("V", cfg.dims) if cfg.output_bias else None

    def __call__(
        self, tokens_BT: Array, segments_BT: Array, positions_BT: Array, cfg: ModelConfig, *, causal: bool = True
    ) -> tuple[Array, dict[str, Routing]]:
        """The last hidden states x_BTD in the compute type, and what the routers did, by the name of the layers' place.

        int32 inputs, one segment number a document.
        """
        here = Places(segments_BT, positions_BT)
        # The places of the whole row on every context rank, for keys: gathered once, for all layers.
        rows = Rows(here, Places(*jax.reshard(tuple(here), acts("BS"))), tokens_BT != PAD_ID)
        x_BTD = self.embedded(tokens_BT, positions_BT, cfg)
        x_BTD, routing = self._routed(x_BTD, rows, cfg, causal)
        return x_BTD if self.norm is None else self.norm(x_BTD, cfg), routing

    def embedded(self, tokens_BT: Array, positions_BT: Array, cfg: ModelConfig) -> Array:
        """What the first layer reads, x_BTD in the compute type; embeddings are added up, and normed, in float32."""
        x_BTD = look_up(self.embed, tokens_BT)
        if self.positions is not None:
            table_PD = jax.reshard(self.positions[...], gathered(self.positions.letters))
            x_BTD += table_PD.at[positions_BT].get(mode="clip", out_sharding=acts("BTD"))
        if self.types is not None:
            table_YD = jax.reshard(self.types[...], gathered(self.types.letters))
            x_BTD += table_YD[0][None, None]
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD, cfg)
        return x_BTD.astype(cfg.compute_dtype)

    def _routed(self, x_BTD: Array, rows: Rows, cfg: ModelConfig, causal: bool) -> tuple[Array, dict[str, Routing]]:
        by_theta = angles_by_theta(rows.here.positions, cfg)

        def apply(
            x_BTD: Array, block: Block, layer: LayerConfig, nothing: None, *, in_scan: bool
        ) -> tuple[Array, Routing | None]:
            def body(x_BTD: Array, block: Block) -> tuple[Array, Routing | None]:
                return block(x_BTD, rows, by_theta.get(layer.rope_theta or cfg.rope_theta), cfg, layer, causal=causal)

            # A scan of one turn is no loop.
            looped = in_scan and cfg.unroll < cfg.n_periods
            return rematerialised(body, cfg, in_scan=looped)(x_BTD, block)

        x_BTD, routings = self.through_layers(x_BTD, apply, dict.fromkeys(self.layers), cfg)
        return x_BTD, {name: _summed(routing) for name, routing in routings.items() if routing is not None}

    def through_layers(
        self, x_BTD: Array, apply: Callable, given: Mapping[str, Any], cfg: ModelConfig
    ) -> tuple[Array, dict[str, Any]]:
        """x_BTD after all layers, and what each of them returned, by the name of its place, stacked in front.

        apply(x_BTD, block, its LayerConfig, what it is given, in_scan=) -> (x_BTD, what it returns); what is given is
        stacked as what is returned.
        """
        returned: dict[str, Any] = {}

        def one_period(x_BTD: Array, scanned: dict[str, tuple[Block, Any]]) -> tuple[Array, dict[str, Any]]:
            returned = {}
            for place in cfg.period_places:
                block, mine = scanned[place.name]
                x_BTD, returned[place.name] = apply(x_BTD, block, place.layer, mine, in_scan=True)
            return x_BTD, returned

        def one_by_one(x_BTD: Array, places: Sequence[Place]) -> Array:
            for place in places:
                mine = jax.tree.map(lambda x: x[0], given[place.name])
                x_BTD, out = apply(x_BTD, self.layers[place.name], place.layer, mine, in_scan=False)
                returned[place.name] = jax.tree.map(lambda x: x[None], out)
            return x_BTD

        x_BTD = one_by_one(x_BTD, cfg.leading_places)
        scanned = {place.name: (self.layers[place.name], given[place.name]) for place in cfg.period_places}
        x_BTD, of_scan = jax.lax.scan(one_period, x_BTD, scanned, unroll=cfg.unroll)
        x_BTD = one_by_one(x_BTD, cfg.remaining_places)
        return x_BTD, returned | of_scan

    def head(self, cfg: ModelConfig) -> Head:
        """The output head."""
        unembed = self.embed if cfg.tied_embeddings else self.unembed
        bias_V = None if self.output_bias is None else self.output_bias[...]
        return Head(unembed[...].astype(cfg.compute_dtype), bias_V, self.head_transform)


def _stacked(cfg: ModelConfig, place: Place, keys_L: Array) -> Block:
    """The layers of a place in the scan, in front of each of their weights."""
    keys_L = keys_L[place.first :: place.stride][: place.repeats]
    return jax.vmap(lambda key: Block(cfg, place.layer, nnx.Rngs(params=key)))(keys_L)


def angles_by_theta(positions_BT: Array, cfg: ModelConfig) -> Mapping[float, Angles]:
    """The rotary angles of every theta that a layer has; none with learned positions."""
    if cfg.learned_positions:
        return {}
    return {
        theta: angles(positions_BT, theta, cfg)
        for theta in {layer.rope_theta or cfg.rope_theta for layer in cfg.layers}
    }


def _summed(routing: Routing) -> Routing:
    """The routing of layers stacked in front, with the scalars summed over them."""
    load_balance, router_z, entropy, dropped = (
        jnp.sum(x_L) for x_L in (routing.load_balance, routing.router_z, routing.entropy, routing.dropped)
    )
    return routing._replace(load_balance=load_balance, router_z=router_z, entropy=entropy, dropped=dropped)


# The trained parameters and the routers' choice biases: all that a forward pass reads.
Weights = tuple[nnx.State, nnx.State]


class Parts(NamedTuple):
    """A model taken apart: nnx.merge(graph, *weights) is the model again."""

    graph: nnx.GraphDef
    params: nnx.State
    """What is trained."""
    balance: nnx.State
    """The routers' choice biases; empty without experts or model.moe.balance_rate."""


def split(model: Transformer) -> Parts:
    """The model's structure, its parameters, and the rest of its state."""
    return Parts(*nnx.split(model, nnx.Param, Balance))


def abstract_model(cfg: ModelConfig) -> Parts:
    """The model in parts, its arrays as shapes with shardings; needs a mesh, allocates nothing."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: split(Transformer(cfg, nnx.Rngs(params=key))), key)


def look_up(table: Weight, tokens_BT: Array) -> Array:
    """Rows of a table that is sharded over its vocabulary; float32, since many gradients add up in one row."""

    def local(table_VD: Array, tokens_BT: Array) -> Array:
        table_VD = whole(table_VD, "VD")
        V = table_VD.shape[0]
        row_BT = tokens_BT - jax.lax.axis_index("tensor") * V
        mine_BT = (row_BT >= 0) & (row_BT < V)
        x_BTD = table_VD.at[row_BT].get(mode="clip") * mine_BT[..., None]
        return jax.lax.psum(x_BTD, "tensor")

    return jax.shard_map(local, in_specs=(weights("VD"), acts("BT")), out_specs=acts("BTD"))(table[...], tokens_BT)


def logits(model: Transformer, x_BTD: Array, cfg: ModelConfig) -> Array:
    """Float32 logits_BTV of hidden states; the padded vocabulary is masked."""
    head = model.head(cfg)
    if head.transform is not None:
        x_BTD = head.transform(x_BTD, cfg)
    unembed_VD = jax.reshard(head.unembed_VD, gathered("VD"))
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, unembed_VD, preferred_element_type=jnp.float32)
    if head.bias_V is not None:
        logits_BTV += head.bias_V[None, None]
    logits_BTV = soft_cap(logits_BTV, cfg.logit_soft_cap)
    v_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=jax.typeof(logits_BTV).sharding)
    return jnp.where(v_BTV < cfg.vocab_size, logits_BTV, -jnp.inf)


def soft_cap(logits: Array, cap: float | None) -> Array:
    """cap * tanh(logits / cap); the logits themselves for None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
