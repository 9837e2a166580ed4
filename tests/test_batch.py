"""Rows become inputs, targets, weights, segments and positions; and a checksum that no change of a batch escapes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import batch
from llm_jax.batch import Batch, documents
from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.mesh import acts
from llm_jax.objective import causal, loss
from llm_jax.train import step
from llm_jax.train.step import batch_hash
from tests.small import CFG, B, U, mesh_of, packed_row, plain_rows, put, ragged_rows

MESHES = ({}, {"data": 8}, {"fsdp": 2, "tensor": 4}, {"context": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "expert": 2})
ROWS = ragged_rows(0)


def batch_of(rows: np.ndarray, mesh: dict[str, int], cross_documents: bool = False) -> Batch:
    devices = mesh_of(**mesh)
    with jax.set_mesh(devices):
        rows_ABU = put(rows[None], "ABU", devices)
        return jax.device_get(jax.jit(lambda rows: causal.make_batch(rows, cross_documents))(rows_ABU))


def wrong_entries(mesh: dict[str, int]) -> int:
    """How many numbers of a ragged batch differ from what a loop over its tokens says."""
    made = batch_of(ROWS, mesh)
    wrong = 0
    for b, row in enumerate(ROWS):
        document, start = 0, 0
        for t, (token, target) in enumerate(itertools.pairwise(row)):
            if token == BOS_ID:
                document, start = document + 1, t
            weight = 0.0 if target in (BOS_ID, PAD_ID) else 1.0
            segment = batch.PADDING if token == PAD_ID else document
            expected = (token, segment, t - start, target, weight)
            fields = (made.tokens_BT, made.segments_BT, made.positions_BT, made.targets_BN, made.weights_BN)
            wrong += sum(field[0, b, t] != value for field, value in zip(fields, expected, strict=True))
    return int(wrong)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_token_has_its_document_position_target_and_weight(mesh):
    assert wrong_entries(mesh) == 0


def positions_not_reset(rows_BU):
    segments_BU, positions_BU = documents(rows_BU)
    return segments_BU, jnp.zeros_like(positions_BU) + jnp.arange(U)[None, None]


def one_segment(rows_BU):
    segments_BU, positions_BU = documents(rows_BU)
    return jnp.zeros_like(segments_BU), positions_BU


@pytest.mark.parametrize(
    ("module", "name", "defect"),
    [
        (batch, "documents", positions_not_reset),
        (batch, "documents", one_segment),
        (causal, "BOS_ID", -1),
        (causal, "PAD_ID", -1),
    ],
    ids=["positions not reset", "one segment", "loss on BOS", "loss on padding"],
)
def test_planted_defect_is_seen(module, name, defect, monkeypatch):
    monkeypatch.setattr(module, name, defect)
    assert wrong_entries({}) > 0


def test_across_documents_a_row_is_one_document_and_weights_stay():
    inside, across = batch_of(ROWS, {}), batch_of(ROWS, {}, cross_documents=True)
    np.testing.assert_array_equal(across.segments_BT[0], np.where(ROWS[:, :-1] == PAD_ID, batch.PADDING, 0))
    assert (across.positions_BT == np.arange(U - 1)).all()
    np.testing.assert_array_equal(across.weights_BN, inside.weights_BN)


def test_a_batch_of_padding_weighs_nothing():
    weights = loss.weights(batch_of(np.full((B, U), PAD_ID, np.int32), {}), CFG)
    assert set(map(float, weights.values())) == {0.0}


def test_rows_of_any_length_and_documents_of_one_token():
    rng = np.random.default_rng(0)
    for width in (1, 2, 65):
        row = packed_row(rng, *[1] * width, width=width)
        with jax.set_mesh(mesh_of()):
            segments, positions = jax.jit(documents)(row[None])
        assert (np.asarray(segments) == np.arange(1, width + 1)).all() and not np.asarray(positions).any()


class Hash:
    """batch_hash, traced anew for every mesh and shape, and so with whatever is patched."""

    def __init__(self, mesh: dict[str, int]):
        self.devices = mesh_of(**mesh)
        self.function = jax.jit(lambda rows_ABU, index: batch_hash(rows_ABU, index))

    def __call__(self, rows: np.ndarray, index: int = 0, accumulation: int = 1) -> int:
        with jax.set_mesh(self.devices):
            rows_ABU = put(rows.reshape(accumulation, B // accumulation, U), "ABU", self.devices)
            return int(self.function(rows_ABU, put(np.asarray(index, np.int32), "", self.devices)))


def reference_hash(rows: np.ndarray, index: int) -> int:
    """The checksum in Python's own integers."""

    def mix(x: int) -> int:
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    rows_of_all = enumerate(rows.tolist(), start=index * len(rows))
    return sum(mix(mix(mix(r) + u) + token) for r, row in rows_of_all for u, token in enumerate(row)) % 2**32


def test_hash_is_what_it_says():
    hash_of = Hash({})
    for index in (0, 7, 2**31 - 1):
        assert hash_of(ROWS, index) == reference_hash(ROWS, index)


def test_hash_is_equal_on_all_meshes_and_for_every_accumulation():
    on_meshes = {Hash(mesh)(ROWS, 3) for mesh in MESHES}
    assert on_meshes | {Hash({})(ROWS, 3, A) for A in (1, 2, 4, 8)} == {reference_hash(ROWS, 3)}


def unseen_changes() -> list[str]:
    """Changes of a batch that leave its checksum as it was."""
    changes = {"all rows reversed": ROWS[::-1], "other rows": plain_rows(0)}
    for b, u in itertools.product(range(B), range(0, U, 4)):
        changes[f"token {b}, {u}"] = ROWS.copy()
        changes[f"token {b}, {u}"][b, u] += 1
    for a, b in [(0, 1), (2, 7), (3, 4)]:
        changes[f"rows {a} and {b} swapped"] = ROWS.copy()
        changes[f"rows {a} and {b} swapped"][[a, b]] = ROWS[[b, a]]
    for u in (0, 9):
        changes[f"tokens {u} and {u + 1} swapped"] = ROWS.copy()
        changes[f"tokens {u} and {u + 1} swapped"][2, [u, u + 1]] = ROWS[2, [u + 1, u]]
    for shift in (1, -1, 5):
        changes[f"positions shifted by {shift}"] = np.roll(ROWS, shift, axis=1)
    hash_of = Hash({})
    original = hash_of(ROWS)
    unseen = [what for what, rows in changes.items() if hash_of(np.ascontiguousarray(rows)) == original]
    return unseen + (["batch index"] if hash_of(ROWS, 1) == original else [])


def test_hash_sees_every_change():
    assert unseen_changes() == []


def test_planted_sum_without_mixing_sees_neither_swapped_rows_nor_shifts(monkeypatch):
    monkeypatch.setattr(step, "mix", lambda x: x)
    assert {"rows 0 and 1 swapped", "tokens 0 and 1 swapped", "positions shifted by 1"} <= set(unseen_changes())


def test_batch_is_sharded_by_its_letters():
    devices = mesh_of(context=2, fsdp=2, tensor=2)
    with jax.set_mesh(devices):
        made = jax.jit(lambda rows: causal.make_batch(rows, False))(put(ROWS[None], "ABU", devices))
        for field in jax.tree.leaves(made):
            assert field.sharding.is_equivalent_to(jax.NamedSharding(devices, acts("ABT")), 3)
