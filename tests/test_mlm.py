"""What is hidden: exactly as much as asked for, whole words and spans, never a control token, the same on every mesh.

And what is made of it: the head on the predicted places alone is the whole head, on every mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from llm_jax.batch import Batch, row_keys
from llm_jax.data.config import EOS_ID, MASK_ID, PAD_ID, SPECIAL_PIECES, UNK_ID
from llm_jax.mesh import acts
from llm_jax.objective import loss as objectives
from llm_jax.objective import mlm
from llm_jax.objective.config import MlmConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.train import step as steps
from llm_jax.train.state import TrainState, with_weights
from tests.small import (
    CFG,
    SETTINGS,
    B,
    U,
    deviation,
    mesh_of,
    packed_row,
    plain_rows,
    put,
    put_weights,
    ragged_rows,
    slowly,
    weights_of,
)

VOCAB = CFG.vocab_size
T = U - 1
FIRST = len(SPECIAL_PIECES)
MESHES = ({}, {"data": 8}, {"context": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "fsdp": 2})
UNITS = ("token", "word", "span")
# A third of the pieces begin a word, a fifth end one.
WORD_STARTS = np.stack([np.arange(VOCAB) % 3 == 0, np.arange(VOCAB) % 5 == 0], axis=1)
TOLERANCE = 1e-5


def config(unit: str, **fields: float) -> MlmConfig:
    return MlmConfig.model_validate({"unit": unit, **fields})


def controlled_rows() -> np.ndarray:
    """Ragged rows, in which every control token occurs, and rows of 0 to 7 tokens that can be hidden."""
    rows = np.concatenate([ragged_rows(0), plain_rows(1)])
    rows[2, 3:9] = (UNK_ID, EOS_ID, MASK_ID, PAD_ID, MASK_ID, UNK_ID)
    rng = np.random.default_rng(2)
    return np.concatenate([rows, *([packed_row(rng, n + 1)] for n in range(8))])


ROWS = controlled_rows()


class Drawn(NamedTuple):
    """A Batch as numpy arrays, microbatches one after the other."""

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    targets_BN: np.ndarray
    weights_BN: np.ndarray
    places_BN: np.ndarray


def draw(
    rows: np.ndarray,
    objective: MlmConfig,
    mesh: dict[str, int] | None = None,
    accumulation: int = 1,
    *,
    seed: int = 0,
    first: int = 0,
) -> Drawn:
    """What is drawn for rows whose numbers begin at `first`."""
    devices = mesh_of(**(mesh or {}))
    shape = (accumulation, len(rows) // accumulation, rows.shape[1])
    with jax.set_mesh(devices):
        rows_ABU = put(rows.reshape(shape), "ABU", devices)
        batch = _drawing(objective.model_dump_json())(rows_ABU, np.uint32(seed), np.uint32(first))
    fields = {name: np.asarray(getattr(batch, name)) for name in Drawn._fields}
    return Drawn(**{name: field.reshape(-1, field.shape[-1]) for name, field in fields.items()})


@functools.cache
def _drawing(json: str) -> Callable[[Array, np.uint32, np.uint32], Batch]:
    objective = MlmConfig.model_validate_json(json)

    def batch(rows_ABU: Array, seed: Array, first: Array) -> Batch:
        keys_AB = row_keys(jax.random.key(seed), first, *rows_ABU.shape[:2])
        return objectives.make_batch(rows_ABU, keys_AB, objective, WORD_STARTS, cross_documents=False)

    return jax.jit(batch)


def asked(batch: Drawn, row: int) -> np.ndarray:
    """The places of a row that are predicted."""
    return batch.places_BN[row][batch.weights_BN[row] > 0]


def budget(rate: float, free: int) -> int:
    """rate * free, halves rounded up, in whole numbers; the rate has two digits after the point."""
    return (2 * round(100 * rate) * free + 100) // 200


def units_of(row_T: np.ndarray, unit: str) -> list[range]:
    """The tokens or words of a row, by a loop over its tokens."""
    begun: list[list[int]] = []
    for t, token in enumerate(row_T):
        if token < FIRST:
            continue
        goes_on = t > 0 and row_T[t - 1] >= FIRST
        inside = goes_on and not WORD_STARTS[token, 0] and not WORD_STARTS[row_T[t - 1], 1]
        if unit == "word" and inside:
            begun[-1].append(t)
        else:
            begun.append([t])
    return [range(places[0], places[-1] + 1) for places in begun]


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_hidden_can_be_put_back_and_is_no_control_token(unit: str) -> None:
    batch = draw(ROWS, config(unit, rate=0.3))
    N = batch.places_BN.shape[1]
    assert N == math.ceil(0.3 * T) == batch.targets_BN.shape[1] == batch.weights_BN.shape[1]
    for row, row_U in enumerate(ROWS):
        places = asked(batch, row)
        n = len(places)
        assert (batch.weights_BN[row] == (np.arange(N) < n)).all(), "predicted places come first"
        assert (np.diff(places) > 0).all() and (np.diff(batch.places_BN[row]) >= 0).all()
        restored = batch.tokens_BT[row].copy()
        restored[places] = batch.targets_BN[row, :n]
        np.testing.assert_array_equal(restored, row_U[:-1])
        assert (batch.targets_BN[row, :n] >= FIRST).all() and (batch.targets_BN[row, n:] == PAD_ID).all()
        seen = batch.tokens_BT[row][places]
        assert ((seen >= FIRST) | (seen == MASK_ID)).all() and (seen < VOCAB).all()


@pytest.mark.parametrize("rate", [0.15, 0.3, slowly(0.5), slowly(0.99)])
def test_single_tokens_are_exactly_as_many_as_the_rate_says(rate: float) -> None:
    batch = draw(ROWS, config("token", rate=rate))
    free = [(row[:-1] >= FIRST).sum() for row in ROWS]
    assert {0, 1, 2, 3, 4, 5, 6, 7, T} <= set(free)
    assert [len(asked(batch, row)) for row in range(len(ROWS))] == [budget(rate, n) for n in free]


def test_budgets_are_those_of_the_rate_as_it_is_written() -> None:
    for hundredths in range(1, 100, 7):
        rate = hundredths / 100
        expected = [(2 * hundredths * n + 100) // 200 for n in range(201)]
        assert mlm.budgets(rate, 200).tolist() == expected
        assert mlm.n_places(rate, 200, 1) == -(-hundredths * 200 // 100) >= max(expected)
    assert mlm.budgets(0.1, 5)[5] == 1, "0.5 is rounded up"
    assert mlm.budgets(1e-4, 6000)[4999:].tolist() == [0] + [1] * 1001
    assert [mlm.n_places(0.15, 128, parts) for parts in (1, 2, 4, 8)] == [20, 20, 20, 24]


@pytest.mark.parametrize("rate", [0.15, slowly(0.5)])
def test_words_are_hidden_whole_and_within_the_budget(rate: float) -> None:
    short = 0
    for seed in range(6):
        batch = draw(ROWS, config("word", rate=rate), seed=seed)
        for row, row_U in enumerate(ROWS):
            short += check_units(set(asked(batch, row).tolist()), units_of(row_U[:-1], "word"), rate)
    assert short > 0, "never having to stop early would prove little"


def check_units(places: set[int], units: list[range], rate: float) -> bool:
    """Whether the budget was missed, by less than one of the units that were left."""
    assert all(places.issuperset(unit) or places.isdisjoint(unit) for unit in units)
    missing = budget(rate, sum(map(len, units))) - len(places)
    left = [len(unit) for unit in units if places.isdisjoint(unit)]
    assert 0 <= missing < max([*left, 1])
    return missing > 0


@functools.cache
def _numbering(unit: str, span_mean: float = 3) -> Callable[[np.ndarray, Array], Array]:
    objective = config(unit, span_mean=span_mean)
    return jax.jit(lambda tokens_T, key: mlm.unit_numbers(tokens_T, key, objective, WORD_STARTS))


@pytest.mark.parametrize("unit", ["token", "word"])
def test_units_are_numbered_as_a_loop_does(unit: str) -> None:
    for row_U in ROWS:
        numbers = np.zeros(T, int)
        for number, places in enumerate(units_of(row_U[:-1], unit), 1):
            numbers[places] = number
        np.testing.assert_array_equal(_numbering(unit)(row_U[:-1], jax.random.key(0)), numbers)


def test_spans_have_geometric_lengths_and_end_with_their_document() -> None:
    rng = np.random.default_rng(0)
    row_T = packed_row(rng, 20_000, 30_000, width=50_000)
    number_T = np.asarray(_numbering("span", 4)(row_T, jax.random.key(0)))
    assert number_T[0] == number_T[20_000] == 0
    assert number_T[19_999] + 1 == number_T[20_001]
    lengths = np.bincount(number_T)[1:]
    n = len(lengths)
    assert lengths.mean() == pytest.approx(4, abs=5 * math.sqrt(12 / n))  # the variance is mean * (mean - 1)
    for length in range(1, 12):
        share = 0.25 * 0.75 ** (length - 1)
        assert abs((lengths == length).sum() - n * share) < 5 * math.sqrt(n * share)


@pytest.mark.parametrize("rate", [0.15, slowly(0.5)])
def test_spans_are_hidden_whole_and_within_the_budget(rate: float) -> None:
    choose = jax.jit(lambda unit_T, key: mlm.choose(unit_T, key, rate, math.ceil(rate * T)))
    short = 0
    for seed, row_U in enumerate(np.concatenate([ROWS] * 4)):
        key = jax.random.key(seed)
        number_T = np.asarray(_numbering("span")(row_U[:-1], key))
        places_N, n = choose(number_T, key)
        units = [
            range(*np.flatnonzero(number_T == number)[[0, -1]] + (0, 1)) for number in range(1, number_T.max() + 1)
        ]
        short += check_units(set(np.asarray(places_N)[:n].tolist()), units, rate)
    assert short > 0


def test_every_token_is_hidden_as_often_as_any_other() -> None:
    row = packed_row(np.random.default_rng(0), 10, 23)
    counts = np.zeros(T)
    for seed in range(4):
        batch = draw(np.stack([row] * 1000), config("token"), seed=seed)
        for r in range(1000):
            counts[asked(batch, r)] += 1
    n = sum(row[:-1] >= FIRST)
    expected = np.where(row[:-1] >= FIRST, 4000 * budget(0.15, n) / n, 0)
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("unit", ["token", "word", slowly("span")])
def test_shares_of_masks_and_of_random_pieces(unit: str) -> None:
    rows = np.stack([packed_row(np.random.default_rng(row), first=U) for row in range(2000)])
    batch = draw(rows, config(unit, rate=0.3))
    real = batch.weights_BN > 0
    seen = np.take_along_axis(batch.tokens_BT, batch.places_BN, axis=1)[real]
    targets = batch.targets_BN[real]
    n = len(seen)
    pieces = VOCAB - FIRST
    # A random piece is the token itself once in so many times.
    shares = {"mask": 0.8, "kept": 0.1 + 0.1 / pieces, "random": 0.1 - 0.1 / pieces}
    counts = {"mask": (seen == MASK_ID).sum(), "kept": (seen == targets).sum()}
    counts["random"] = n - counts["mask"] - counts["kept"]
    for name, share in shares.items():
        assert abs(counts[name] - n * share) < 5 * math.sqrt(n * share * (1 - share)), (name, counts[name] / n)
    random = seen[(seen != MASK_ID) & (seen != targets)]
    assert random.min() == FIRST and random.max() == VOCAB - 1
    often = np.bincount(random, minlength=VOCAB)[FIRST:]
    assert (np.abs(often - len(random) / pieces) < 6 * math.sqrt(len(random) / pieces)).all()


@pytest.mark.parametrize(("mask", "random"), [slowly(1, 0), (0, 1), slowly(0, 0)])
def test_shares_of_all_and_of_nothing(mask: int, random: int) -> None:
    batch = draw(ROWS, config("token", mask_share=mask, random_share=random))
    real = batch.weights_BN > 0
    seen = np.take_along_axis(batch.tokens_BT, batch.places_BN, axis=1)[real]
    kept = (seen == batch.targets_BN[real]).mean()
    assert ((seen == MASK_ID).all(), kept == 1, kept < 0.2) == (mask == 1, mask == random == 0, mask != random)


@pytest.mark.parametrize(
    ("unit", "mesh", "accumulation"),
    [
        slowly("token", {}, 4),
        slowly("token", {"data": 8}, 1),
        slowly("token", {"context": 4, "fsdp": 2}, 1),
        *((unit, {"context": 2, "fsdp": 2, "tensor": 2}, 4) for unit in UNITS),
    ],
)
def test_neither_mesh_nor_accumulation_changes_what_is_hidden(unit: str, mesh, accumulation: int) -> None:
    expected, batch = draw(ROWS, config(unit)), draw(ROWS, config(unit), mesh, accumulation)
    n = int(expected.weights_BN.sum(axis=1).max())
    assert batch.places_BN.shape[1] % mesh.get("context", 1) == 0
    # Room for more places is all that a context axis may change.
    for name in ("targets_BN", "weights_BN", "places_BN"):
        np.testing.assert_array_equal(getattr(batch, name)[:, :n], getattr(expected, name)[:, :n])
    assert not batch.weights_BN[:, n:].any()
    for name in ("tokens_BT", "segments_BT", "positions_BT"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name))


def test_a_rows_number_decides_and_not_its_place_in_a_batch() -> None:
    objective = config("token")
    whole, later = draw(ROWS, objective, first=100), draw(ROWS[8:16], objective, first=108)
    np.testing.assert_array_equal(whole.tokens_BT[8:16], later.tokens_BT)
    same = draw(np.stack([ROWS[8]] * 8), objective)
    assert len({row.tobytes() for row in same.tokens_BT}) == 8
    assert (draw(ROWS[8:16], objective, first=0).tokens_BT != later.tokens_BT).any(axis=1).all()
    assert (draw(ROWS[8:16], objective, first=108, seed=1).tokens_BT != later.tokens_BT).any(axis=1).all()


def test_batch_is_sharded_by_its_letters() -> None:
    devices = mesh_of(context=2, fsdp=2, tensor=2)
    with jax.set_mesh(devices):
        batch = _drawing(config("token").model_dump_json())(
            put(ragged_rows(0)[None], "ABU", devices), np.uint32(0), np.uint32(0)
        )
        for field in jax.tree.leaves(batch):
            assert field.sharding.is_equivalent_to(jax.NamedSharding(devices, acts("ABT")), 3)


# The loss and its gradients.

OBJECTIVE = MlmConfig(rate=0.3, z_loss=1e-2)
BATCH = np.concatenate([ragged_rows(0)[[0, 2, 3, 5]], plain_rows(0)[:3], ragged_rows(1)[:1]])


def everywhere(batch_A: Batch) -> Batch:
    """The same batch with the originals of all T positions as targets, and the weights at the predicted places."""
    assert batch_A.places_BN is not None
    a_ABN, b_ABN = (jax.lax.broadcasted_iota(jnp.int32, batch_A.places_BN.shape, axis) for axis in (0, 1))
    here = (a_ABN, b_ABN, batch_A.places_BN)
    weights_ABT = jnp.zeros(batch_A.tokens_BT.shape).at[here].add(batch_A.weights_BN)
    targets_ABT = jnp.zeros(batch_A.tokens_BT.shape, jnp.int32).at[here].max(batch_A.targets_BN)
    return dataclasses.replace(batch_A, places_BN=None, weights_BN=weights_ABT, targets_BN=targets_ABT)


@functools.cache
def gradient(at: int, view: Callable[[Batch], Batch] = lambda batch_A: batch_A) -> tuple[dict, nnx.State]:
    """Statistics' sums and the gradient of BATCH's loss on a mesh, of the batch as a view shows it."""
    devices = mesh_of(**MESHES[at])

    def summed(params: nnx.State, rows_ABU: Array) -> steps.Summed:
        keys_AB = row_keys(jax.random.key(0), 0, *rows_ABU.shape[:2])
        batch_A = objectives.make_batch(rows_ABU, keys_AB, OBJECTIVE, WORD_STARTS, cross_documents=False)
        batch_A = view(batch_A)
        return steps.gradient_sums(params, nnx.State({}), batch_A, objectives.weights(batch_A, CFG), CFG, OBJECTIVE)

    with jax.set_mesh(devices):
        params = put_weights(weights_of(CFG), CFG, devices)
        result = jax.jit(summed)(params, put(BATCH[None], "ABU", devices))
        return jax.device_get((result.statistics, result.gradient))


def wrongness(one: tuple[dict, nnx.State], other: tuple[dict, nnx.State]) -> float:
    """The worst of the losses' relative differences and all gradient leaves' deviations; infinite for another count of
    right guesses."""
    if one[0]["accuracy"] != other[0]["accuracy"]:
        return math.inf
    sums = [abs(one[0][name] / other[0][name] - 1) for name in ("loss", "z_loss")]
    return float(max(*sums, deviation(one[1], other[1])))


def test_the_head_on_the_predicted_places_is_the_head_on_all_of_them() -> None:
    assert wrongness(gradient(0), gradient(0, everywhere)) <= TOLERANCE


@pytest.mark.parametrize("at", [slowly(1), 2, slowly(3)], ids=lambda at: str(MESHES[at]))
def test_a_mesh_changes_no_gradient(at: int) -> None:
    assert wrongness(gradient(at), gradient(0)) <= TOLERANCE


@pytest.mark.slow
def test_planted_places_of_the_wrong_rank_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each context rank looks for its places among its own positions."""

    def near(x_BTD: Array, places_BN: Array) -> Array:
        take = jax.vmap(lambda x_TD, places_N: x_TD.at[places_N].get(mode="clip"))
        return jax.shard_map(take, in_specs=(acts("BTD"), acts("BN")), out_specs=acts("BND"))(x_BTD, places_BN)

    right = gradient(0)
    monkeypatch.setattr(objectives, "at_places", near)
    assert wrongness(gradient.__wrapped__(3), right) > 100 * TOLERANCE


# The step: masks follow from the seed, the batch's number and the row's number in it.


class Updates:
    """The real step, compiled once, from the same weights; with b1 = 0 Adam's first moment is the gradient."""

    def __init__(self, accumulation: int = 1):
        self.devices = mesh_of()
        optim = AdamWConfig(b1=0.0, clip_norm=None, warmup_steps=2)
        settings: dict[str, Any] = SETTINGS | {"word_starts_V": WORD_STARTS}
        with jax.set_mesh(self.devices):
            weights = put_weights(weights_of(CFG), CFG, self.devices)
            begin = jax.jit(lambda params: with_weights(params, nnx.State({}), optim))
            self.state = begin(weights)
            self.rows_ABU = put(BATCH.reshape(accumulation, B // accumulation, U), "ABU", self.devices)
            step = jax.jit(steps.make_step(CFG, OBJECTIVE, optim, **settings, steps=4))
            self.step = step.lower(self.state, self.rows_ABU).compile()

    def __call__(self, batch_index: int) -> tuple[dict, nnx.State]:
        state: TrainState = dataclasses.replace(self.state, batch_index=jnp.int32(batch_index))
        with jax.set_mesh(self.devices):
            after, metrics = self.step(state, self.rows_ABU)
        return jax.device_get((metrics, after.opt_state[0].mu))


@functools.cache
def whole() -> Updates:
    return Updates()


def test_every_batch_and_so_every_epoch_has_masks_of_its_own() -> None:
    metrics = [whole()(index)[0] for index in (0, 0, 1, 7)]
    assert metrics[0]["loss"] == metrics[1]["loss"]
    assert len({float(m["loss"]) for m in metrics}) == 3
    free = (BATCH[:, :-1] >= FIRST).sum(axis=1)
    assert {int(m["tokens"]) for m in metrics} == {sum(budget(OBJECTIVE.rate, int(n)) for n in free)}


def test_accumulation_changes_no_loss_and_no_gradient() -> None:
    parts = Updates(accumulation=4)
    for index in (0, 7):
        assert wrongness(parts(index), whole()(index)) <= TOLERANCE


def test_planted_masks_keyed_by_microbatch_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = whole()(0)

    def inside(key: Array, first: int, A: int, B: int) -> Array:
        keys_B = row_keys(key, first, 1, B)
        return jnp.concatenate([keys_B] * A)

    monkeypatch.setattr(steps, "row_keys", inside)
    assert wrongness(Updates(accumulation=4)(0), right) > 100 * TOLERANCE
