"""Experts behind one wall: tokens go to their experts' devices, are multiplied there, and their results come back.

Inside the wall a device has N tokens of its own, each with X choices, C = N * X in all. Choices travel as the R rows of
a buffer. E are all experts, or a device's own, as the array says.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, P
from jax.ad_checkpoint import checkpoint_name

from llm_jax.mesh import acts
from llm_jax.mesh import weights as weight_spec
from llm_jax.model.activation import activate
from llm_jax.model.config import ModelConfig
from llm_jax.model.grouped_matmul import group_rows, grouped_matmul
from llm_jax.model.weights import whole

# The names under which remat is told who sits where, and of the rows that came to their experts.
ROUTED = ("seats", "expert_rows")


class ExpertWeights(NamedTuple):
    """The matrices of all experts: outside the wall as they are stored, inside whole over fsdp."""

    gate_EDF: Array | None
    up_EDF: Array
    down_EFD: Array


class Choices(NamedTuple):
    """What the router decided for each token, best choice first."""

    experts_BTX: Array
    """Int32."""
    gates_BTX: Array
    """Float32; the share of each expert's result."""


def capacity(cfg: ModelConfig, T: int) -> int:
    """Slots that an expert has for a row of T tokens (M); its even share times the capacity factor, at most T."""
    moe = cfg.moe
    assert moe is not None and moe.capacity_factor is not None
    return min(T, math.ceil(moe.capacity_factor * T * moe.top_k / moe.experts))


def apply_experts(
    x_BTD: Array, choices: Choices, real_BT: Array, weights: ExpertWeights, cfg: ModelConfig
) -> tuple[Array, Array]:
    """The sum of gate times the expert's result over each token's choices, in x's type; and how many were dropped.

    Tokens are sharded over all axes but tensor, experts over expert, and their hidden units over tensor. A dropped
    choice adds nothing; padding, where real_BT is false, takes no slot and is not counted.
    """
    assert cfg.moe is not None
    with_capacity = cfg.moe.capacity_factor is not None

    def local(
        x_BTD: Array, choices: Choices, real_BT: Array, inner: tuple[Array | None, Array], down_EFD: Array
    ) -> tuple[Array, Array]:
        # Every device has a part of the gradient of what is the same on several. Their sum is asked for here, before
        # any exchange: so the backward pass makes it once, and where it is smallest.
        x_BTD, gates_BTX = jax.lax.pcast((x_BTD, choices.gates_BTX), ("tensor",), to="varying")
        choices = Choices(choices.experts_BTX, gates_BTX)
        gate_EDF, up_EDF = inner
        gate_EDF = None if gate_EDF is None else whole(gate_EDF, "EDF")
        weights = ExpertWeights(gate_EDF, whole(up_EDF, "EDF"), whole(down_EFD, "EFD"))
        if with_capacity:
            y_BTD, dropped = _with_capacity(x_BTD, choices, real_BT, weights, cfg)
        else:
            y_BTD, dropped = _dropless(x_BTD, choices, weights, cfg), jnp.zeros((), jnp.int32)
        return jax.lax.psum(y_BTD, "tensor"), dropped

    in_specs = (acts("BTD"), acts("BTX"), acts("BT"), weight_spec("EDF"), weight_spec("EFD"))
    wall = jax.shard_map(local, in_specs=in_specs, out_specs=(acts("BTD"), P()))
    return wall(x_BTD, choices, real_BT, (weights.gate_EDF, weights.up_EDF), weights.down_EFD)


def _multiply(
    x_RD: Array, gate_R: Array, sizes_E: Array, weights: ExpertWeights, cfg: ModelConfig, rows: int = 1
) -> Array:
    """Each row through the MLP of its expert; sizes_E in multiples of `rows`. Rows that nobody chose need a gate of 0.

    The gate scales hidden units: so the backward pass does not need the results.
    """
    assert cfg.moe is not None and cfg.moe.grouped_matmul != "auto"
    product = functools.partial(grouped_matmul, sizes_E=sizes_E, backend=cfg.moe.grouped_matmul, rows=rows)
    x_RD = checkpoint_name(x_RD, "expert_rows")
    up_RF, gate_RF = checkpoint_name(product(x_RD, weights.up_EDF), "mlp_up"), None
    if weights.gate_EDF is not None:
        gate_RF = checkpoint_name(product(x_RD, weights.gate_EDF), "mlp_gate")
    hidden_RF = (activate(cfg, gate_RF, up_RF) * gate_R[:, None]).astype(x_RD.dtype)
    return product(hidden_RF, weights.down_EFD)


# Rows of a buffer, and choices: who is where.


class Seats(NamedTuple):
    """Which choice sits in each of R rows, and where each of C choices sits; a permutation with gaps, both ways."""

    choice_R: Array
    """C: nobody."""
    row_C: Array
    """R: nowhere."""


def _seated(row_C: Array, R: int) -> Seats:
    """Seats by where each choice sits."""
    C = row_C.size
    nobody_R = jnp.full_like(row_C, C, shape=(R,))
    seats = Seats(nobody_R.at[row_C].set(jnp.arange(C, dtype=row_C.dtype), mode="drop"), row_C)
    return Seats(*(checkpoint_name(a, "seats") for a in seats))


def _sorted(expert_C: Array, E: int, R: int, rows: int = 1) -> tuple[Seats, Array]:
    """Seats in R rows by expert, earlier choices first, and the rows of each of E experts; expert E has none.

    Experts begin at multiples of `rows`, and have such a multiple: nobody sits in the last of them.
    """
    C = expert_C.size
    chosen_E = jnp.sum(expert_C[:, None] == jnp.arange(E)[None], axis=0, dtype=jnp.int32)
    sizes_E = -(-chosen_E // rows) * rows
    order_C = jnp.argsort(expert_C, stable=True).astype(jnp.int32)
    rank_C = jnp.zeros_like(order_C).at[order_C].set(jnp.arange(C, dtype=jnp.int32), unique_indices=True)
    row_C = rank_C + (_starts(sizes_E) - _starts(chosen_E)).at[expert_C].get(mode="clip")
    return _seated(jnp.where(expert_C < E, row_C, R), R), sizes_E


def _room(C: int, E: int, cfg: ModelConfig) -> tuple[int, int]:
    """Rows that C choices need at most, sorted by E experts for the grouped matmul; each expert's are a multiple of
    the second number."""
    assert cfg.moe is not None and cfg.moe.grouped_matmul != "auto"
    rows = group_rows(cfg.moe.grouped_matmul, C, E)
    return C if rows == 1 else (-(-C // rows) + E - 1) * rows, rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(x_ND: Array, seats: Seats, X: int) -> Array:
    """x_RD: each row's token; nobody's rows hold some token or other."""
    return x_ND.at[seats.choice_R // X].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(y_RD: Array, seats: Seats, X: int) -> Array:
    """y_ND: the sum of the rows of each token's choices."""
    y_CD = y_RD.at[seats.row_C].get(mode="fill", fill_value=0)
    return jnp.sum(y_CD.reshape(-1, X, y_RD.shape[1]), axis=1)


# Each is the other's gradient, so neither needs a scatter.
_dispatch.defvjp(
    lambda x, seats, X: (_dispatch(x, seats, X), seats), lambda X, seats, dx: (_combine(dx, seats, X), None)
)
_combine.defvjp(
    lambda y, seats, X: (_combine(y, seats, X), seats), lambda X, seats, dy: (_dispatch(dy, seats, X), None)
)


@jax.custom_vjp
def _dispatch_gates(gates_C: Array, seats: Seats) -> Array:
    """gate_R: each row's gate; nobody's is 0."""
    return gates_C.at[seats.choice_R].get(mode="fill", fill_value=0)


_dispatch_gates.defvjp(
    lambda gates, seats: (_dispatch_gates(gates, seats), seats),
    lambda seats, dgate: (dgate.at[seats.row_C].get(mode="fill", fill_value=0), None),
)


# Without a capacity: whatever the router chooses has room.


def _dropless(x_BTD: Array, choices: Choices, weights: ExpertWeights, cfg: ModelConfig) -> Array:
    x_ND = x_BTD.reshape(-1, x_BTD.shape[2])
    experts_NX, gates_NX = (a.reshape(x_ND.shape[0], -1) for a in choices)
    arguments = (x_ND, experts_NX, gates_NX, weights, cfg)
    if jax.lax.axis_size("expert") == 1:
        return _own(*arguments).reshape(x_BTD.shape)
    assert cfg.moe is not None
    match cfg.moe.exchange:
        case "all_gather":
            y_ND = _by_all_gather(*arguments)
        case "all_to_all":
            y_ND = _by_all_to_all(*arguments)
        case "ragged_all_to_all":
            y_ND = _by_ragged_all_to_all(*arguments)
        case exchange:
            raise AssertionError(f"exchange {exchange!r} was not resolved")
    return y_ND.reshape(x_BTD.shape)


def _own(x_ND: Array, experts_NX: Array, gates_NX: Array, weights: ExpertWeights, cfg: ModelConfig) -> Array:
    """What the device's own E experts make of the choices that fall on them; any other number is nobody here."""
    N, X = experts_NX.shape
    E = weights.up_EDF.shape[0]
    R, rows = _room(N * min(X, E), E, cfg)
    seats, sizes_E = _sorted(experts_NX.reshape(-1), E, R, rows)
    gate_R = _dispatch_gates(gates_NX.reshape(-1), seats)
    return _combine(_multiply(_dispatch(x_ND, seats, X), gate_R, sizes_E, weights, cfg, rows), seats, X)


def _by_all_gather(x_ND: Array, experts_NX: Array, gates_NX: Array, weights: ExpertWeights, cfg: ModelConfig) -> Array:
    """Every device sees its expert group's tokens, and the results of all are added up where the tokens came from.

    It moves at most as much as exact buffers do, which must hold every token for every device.
    """
    gathered = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x_ND, experts_NX, gates_NX))
    x_ND, experts_NX, gates_NX = gathered
    E = weights.up_EDF.shape[0]
    mine_NX = experts_NX - jax.lax.axis_index("expert") * E
    mine_NX = jnp.where((mine_NX >= 0) & (mine_NX < E), mine_NX, E)
    return jax.lax.psum_scatter(_own(x_ND, mine_NX, gates_NX, weights, cfg), "expert", tiled=True)


def _by_all_to_all(x_ND: Array, experts_NX: Array, gates_NX: Array, weights: ExpertWeights, cfg: ModelConfig) -> Array:
    """A buffer for each device of the group, with room for all the choices that can fall on its experts."""
    n, E = jax.lax.axis_size("expert"), weights.up_EDF.shape[0]
    N, X = experts_NX.shape
    room = N * min(X, E)
    expert_C = experts_NX.reshape(-1)
    by_expert, sizes_nE = _sorted_for_peers(expert_C, n, E)
    # Choices sorted by expert are sorted by device too, and take the first seats of its buffer.
    peer_C = expert_C // E
    row_C = by_expert.row_C - _starts(jnp.sum(sizes_nE, axis=1))[peer_C] + peer_C * room
    seats = _seated(row_C, n * room)

    def exchanged(a: Array) -> Array:
        return jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)

    x_RD = exchanged(_dispatch(x_ND, seats, X))
    gate_R = exchanged(_dispatch_gates(gates_NX.reshape(-1), seats))
    received_nE = exchanged(sizes_nE)
    place = jnp.arange(room)[None, :, None]
    expert_R = jnp.sum(place >= jnp.cumsum(received_nE, axis=1)[:, None], axis=2, dtype=jnp.int32).reshape(-1)
    y_RD = _regrouped(x_RD, gate_R, expert_R, weights, cfg)
    return _combine(exchanged(y_RD), seats, X)


def _sorted_for_peers(expert_C: Array, n: int, E: int) -> tuple[Seats, Array]:
    """Choices sorted by expert, and how many each of E experts of each of n devices gets, [n, E]."""
    seats, sizes = _sorted(expert_C, n * E, expert_C.size)
    return seats, sizes.reshape(n, E)


def _regrouped(x_RD: Array, gate_R: Array, expert_R: Array, weights: ExpertWeights, cfg: ModelConfig) -> Array:
    """Rows as they came, from several devices, through their experts and back in their order; expert E is nobody."""
    E = weights.up_EDF.shape[0]
    R, rows = _room(expert_R.size, E, cfg)
    seats, sizes_E = _sorted(expert_R, E, R, rows)
    y_RD = _multiply(_dispatch(x_RD, seats, 1), _dispatch_gates(gate_R, seats), sizes_E, weights, cfg, rows)
    return _combine(y_RD, seats, 1)


def _starts(sizes: Array) -> Array:
    """Where each of consecutive groups begins."""
    return jnp.cumsum(sizes) - sizes


class _Parcels(NamedTuple):
    """Rows on their way, a parcel for each device of the group: what lax.ragged_all_to_all wants to know."""

    starts: Array
    """Where a parcel begins here."""
    sizes: Array
    places: Array
    """Where it will begin there."""
    received_sizes: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _send(rows: Array, there: _Parcels, back: _Parcels, n_here: int, n_there: int) -> Array:
    """Of n_here rows the parcels, one after another in n_there rows, of which the others are 0."""
    arrived = jnp.zeros_like(rows, shape=(n_there, *rows.shape[1:]))
    return jax.lax.ragged_all_to_all(rows, arrived, *there, axis_name="expert")


def _send_forward(
    rows: Array, there: _Parcels, back: _Parcels, n_here: int, n_there: int
) -> tuple[Array, tuple[_Parcels, _Parcels]]:
    return _send(rows, there, back, n_here, n_there), (there, back)


def _send_backward(
    n_here: int, n_there: int, saved: tuple[_Parcels, _Parcels], drows: Array
) -> tuple[Array, None, None]:
    there, back = saved
    return _send(drows, back, there, n_there, n_here), None, None


_send.defvjp(_send_forward, _send_backward)


def _by_ragged_all_to_all(
    x_ND: Array, experts_NX: Array, gates_NX: Array, weights: ExpertWeights, cfg: ModelConfig
) -> Array:
    """Choices alone travel, and no gaps; a device still has room for all that can fall on its experts."""
    n, E = jax.lax.axis_size("expert"), weights.up_EDF.shape[0]
    N, X = experts_NX.shape
    seats, sizes_nE = _sorted_for_peers(experts_NX.reshape(-1), n, E)

    def exchanged(a: Array) -> Array:
        return jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)

    received_nE = exchanged(sizes_nE)
    sizes, received = jnp.sum(sizes_nE, axis=1), jnp.sum(received_nE, axis=1)
    starts, arrivals = _starts(sizes), _starts(received)
    there = _Parcels(starts, sizes, exchanged(arrivals), received)
    back = _Parcels(arrivals, received, exchanged(starts), sizes)
    C, R = N * X, n * N * min(X, E)
    x_RD: Array = _send(_dispatch(x_ND, seats, X), there, back, C, R)
    gate_R: Array = _send(_dispatch_gates(gates_NX.reshape(-1), seats), there, back, C, R)
    ends = jnp.cumsum(received_nE.reshape(-1))
    group_R = jnp.searchsorted(ends, jnp.arange(R), side="right", method="compare_all")
    expert_R = jnp.where(group_R < n * E, group_R % E, E)
    y_RD = _regrouped(x_RD, gate_R, expert_R, weights, cfg)
    return _combine(_send(y_RD, back, there, R, C), seats, X)


# With a capacity: every row of the batch has M slots at every expert, so that drops depend on neither mesh nor batch.


def _with_capacity(
    x_BTD: Array, choices: Choices, real_BT: Array, weights: ExpertWeights, cfg: ModelConfig
) -> tuple[Array, Array]:
    """The devices of a context axis see whole rows, and each has a part of the slots."""
    n, parts, part = jax.lax.axis_size("expert"), jax.lax.axis_size("context"), jax.lax.axis_index("context")
    if parts > 1:
        whole = jax.lax.all_gather((x_BTD, *choices, real_BT), "context", axis=1, tiled=True)
        x_BTD, choices, real_BT = whole[0], Choices(*whole[1:3]), whole[3]
    B, T, D = x_BTD.shape
    E, X, M = n * weights.up_EDF.shape[0], choices.experts_BTX.shape[2], capacity(cfg, T)
    slots_BTX = _slots(choices.experts_BTX, real_BT, E, M)
    # Counted once, although the devices of a context axis all know.
    dropped = jnp.where(part == 0, jnp.sum(real_BT[:, :, None] & (slots_BTX == M), dtype=jnp.int32), 0)

    share = -(-M // parts)
    R = E * B * share
    slots_BTX = jnp.where((slots_BTX < M) & (slots_BTX // share == part), slots_BTX % share, share)
    b_BTX = jax.lax.broadcasted_iota(jnp.int32, slots_BTX.shape, 0)
    row_BTX = jnp.where(slots_BTX < share, (choices.experts_BTX * B + b_BTX) * share + slots_BTX, R)
    seats = _seated(row_BTX.reshape(-1), R)
    x_RD: Array = _dispatch(x_BTD.reshape(-1, D), seats, X)
    gate_R: Array = _dispatch_gates(choices.gates_BTX.reshape(-1), seats)

    def exchanged(a: Array, split: int, concat: int) -> Array:
        return a if n == 1 else jax.lax.all_to_all(a, "expert", split, concat, tiled=True)

    x_EMD = exchanged(x_RD.reshape(E, B * share, D), 0, 1)
    gate_EM = exchanged(gate_R.reshape(E, B * share), 0, 1)
    sizes_E = jnp.full(x_EMD.shape[0], x_EMD.shape[1], jnp.int32)
    y_RD = _multiply(x_EMD.reshape(-1, D), gate_EM.reshape(-1), sizes_E, weights, cfg)
    y_ND: Array = _combine(exchanged(y_RD.reshape(x_EMD.shape), 1, 0).reshape(R, D), seats, X)
    y_BTD = y_ND.reshape(B, T, D)
    if parts > 1:
        y_BTD = jax.lax.psum_scatter(y_BTD, "context", scatter_dimension=1, tiled=True)
    return y_BTD, jax.lax.psum(dropped, ("data", "fsdp", "expert", "context"))


def _slots(experts_BTX: Array, real_BT: Array, E: int, M: int) -> Array:
    """The slot of each choice at its expert, for whole rows; M where none is left, and for padding.

    All first choices of a row come before all second ones, earlier tokens before later (GShard, Lepikhin et al. 2020).
    """
    B, T, X = experts_BTX.shape
    first_BQ = jnp.swapaxes(jnp.where(real_BT[:, :, None], experts_BTX, E), 1, 2).reshape(B, X * T)
    asks_BQE = (first_BQ[:, :, None] == jnp.arange(E)[None, None]).astype(jnp.int32)
    before_BQ = jnp.sum(jnp.where(asks_BQE > 0, jnp.cumsum(asks_BQE, axis=1) - 1, 0), axis=-1)
    slots_BQ = jnp.where(first_BQ < E, jnp.minimum(before_BQ, M), M)
    return jnp.swapaxes(slots_BQ.reshape(B, X, T), 1, 2)
