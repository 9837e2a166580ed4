"""What the devices of a compiled program send to each other: kinds, counts, bytes, and the axes that they cross."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.plan.hlo import Execution, Program, executions, operand_buffers, total

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """Collectives of one kind over the same mesh axes, of one step."""

    kind: str
    axes: tuple[str, ...]
    """The mesh axes along which devices take part in it together."""
    devices: int
    """How many take part in one of them."""
    runs: int
    """How many run, those in loops as often as they do."""
    payload: int
    """Bytes of the whole arrays: what a gather results in, what all others are given; on one device. Of ragged
    exchanges the smaller of what is given and what results, which is about what moves if routing is even."""
    sent: int
    """Bytes that a device sends, and receives, by a ring: (n-1)/n of the payload, twice that for an all-reduce."""
    slow: bool
    """Whether it crosses the network between slices or hosts."""
    largest_gather: int = 0
    """Bytes of the largest array that one all-gather brings together."""


def collectives(program: Program, axes: Mapping[str, int], domains: Sequence[int]) -> list[Collective]:
    """The program's collectives, most bytes first; those of a single device are none.

    axes: the mesh's sizes, in order; domains: for each device, in the mesh's order, its slice or host.
    """
    found: dict[tuple[str, tuple[str, ...], int, bool], Collective] = {}
    for execution in executions(program):
        one = collective(execution, axes, domains)
        if one is None:
            continue
        key = (one.kind, one.axes, one.devices, one.slow)
        before = found.get(key, one._replace(runs=0, payload=0, sent=0, largest_gather=0))
        found[key] = before._replace(
            runs=before.runs + one.runs,
            payload=before.payload + one.payload,
            sent=before.sent + one.sent,
            largest_gather=max(before.largest_gather, one.largest_gather),
        )
    return sorted(found.values(), key=lambda c: -c.sent)


def collective(execution: Execution, axes: Mapping[str, int], domains: Sequence[int]) -> Collective | None:
    """What an instruction sends in all its executions; None where it sends nothing."""
    instruction, computation = execution.instruction, execution.computation
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    group = member_group(instruction.attributes, math.prod(axes.values()))
    n = 2 if kind == "collective-permute" else len(group)
    if len(group) < 2:
        return None
    # A TPU's reduce-scatter is a fusion of an all-reduce with the slices that are kept of it.
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    operands = operand_buffers(instruction, computation)
    # A ragged exchange goes from its first operand to its second, of which one has room to spare; the others are
    # offsets.
    ragged = kind == "ragged-all-to-all"
    given = min(map(total, operands[:2])) if ragged else sum(total(operand) for operand in operands)
    payload = given * n if kind == "all-gather" else given
    times = execution.times
    return Collective(
        kind=kind,
        axes=crossed(group, axes),
        devices=n,
        runs=times,
        payload=payload * times,
        sent=round(payload * times * sent_share(kind, n)),
        slow=len({domains[i] for i in group}) > 1,
        largest_gather=payload if kind == "all-gather" else 0,
    )


def sent_share(kind: str, n: int) -> float:
    """What a device sends of a payload when n take part."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n


def crossed(group: Sequence[int], axes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the group's devices differ; a device's number is its place in the mesh."""
    places = np.unravel_index(np.asarray(group), tuple(axes.values()))
    return tuple(axis for axis, place in zip(axes, places, strict=True) if len(set(place.tolist())) > 1)


def member_group(attributes: str, n_devices: int) -> list[int]:
    """The devices of the first group of a collective, all of which are alike; all that exchange, of a permutation.

    Groups are written as lists {{0,1},{2,3}}, as iota [2,2]<=[2,2]T(1,0), or by axes mesh['a'=2,'b'=2] {'a'}.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", attributes):
        return _permuted(pairs[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(i) for i in listed[1].split(",") if i]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(iota[1], iota[2], iota[3])[0].tolist()
    if mesh := re.search(r"replica_groups=@?(?:[\w.\-]+ )?mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _by_axes(mesh[1], mesh[2])
    return list(range(n_devices))


def _permuted(pairs: str) -> list[int]:
    """A device and all that it exchanges with, directly or not."""
    edges = {int(source): int(target) for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs)}
    targets = {source: target for source, target in edges.items() if source != target}
    if not targets:
        return []
    chain = [next(iter(targets))]
    while (following := targets.get(chain[-1])) is not None and following not in chain:
        chain.append(following)
    return chain


def _iota(shape: str, dims: str, order: str | None) -> np.ndarray:
    sizes = [int(n) for n in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        numbers = numbers.transpose([int(n) for n in order.split(",")])
    return numbers.reshape([int(n) for n in shape.split(",")])


def _by_axes(mesh: str, chosen: str) -> list[int]:
    """The first group of a mesh over the chosen axes; 'a':(2)4 is four of axis a, after the two before them."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    taken: list[slice | list[int] | int] = []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}
    for axis, size in sizes.items():
        if axis not in parts:
            taken.append(slice(0, 1))
        elif not parts[axis][1]:
            taken.append(slice(None))
        else:
            before, within = (int(n) for n in parts[axis])
            after = size // (before * within)
            taken.append(slice(0, within * after, after))
    return numbers[tuple(taken)].ravel().tolist()
