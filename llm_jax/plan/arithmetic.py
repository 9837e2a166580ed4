"""The products of matrices that a step makes, counted in its jaxpr: what is recomputed and what masks hide included."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from llm_jax.model.config import ModelConfig


def product_flops(jaxpr: Jaxpr, ragged_share: float = 1.0) -> float:
    """FLOPs of all products of matrices on all devices; bodies of scans count as often as they run, of a choice the
    dearest, and of a kernel every tile, those that it skips too.

    ragged_share: of a ragged product's rows inside a shard_map, the share that is some expert's (`routed_share`).
    """
    total = 0.0
    for equation in jaxpr.eqns:
        match equation.primitive.name:
            case "dot_general":
                total += _dot(equation)
            case "ragged_dot_general":
                total += _ragged_dot(equation) * ragged_share
            case "pallas_call" if (cost := equation.params["cost_estimate"]) is not None:
                # How often its loops run is not known here: a kernel of ours says what it is to count for.
                is_ragged = (equation.params["name"] or "").startswith("grouped")
                total += cost.flops * (ragged_share if is_ragged else 1)
                continue
        inner = [product_flops(body, ragged_share) for body in bodies(equation)]
        total += _times(equation) * (max(inner, default=0) if equation.primitive.name == "cond" else sum(inner))
    return total


def routed_share(cfg: ModelConfig, expert_axis: int) -> float:
    """Of the rows of a device's buffers for its experts, the share that routing fills if it is even.

    Where several devices divide the experts, there is room for as many choices of every token as experts on a device.
    """
    if cfg.moe is None:
        return 1.0
    return cfg.moe.top_k / (expert_axis * min(cfg.moe.top_k, cfg.moe.experts // expert_axis))


def _dot(equation: JaxprEqn) -> float:
    contracted, batch = equation.params["dimension_numbers"]
    shapes = [_shape(operand) for operand in equation.invars]
    # A vector times a matrix is a weighted sum, of statistics: neither weights nor attention.
    if any(len(shapes[i]) == len(contracted[i]) + len(batch[i]) for i in (0, 1)):
        return 0
    terms = math.prod(shapes[0][axis] for axis in contracted[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * terms


def _ragged_dot(equation: JaxprEqn) -> float:
    # Each row of the left side meets one group's columns, or all of the right side's where rows are summed.
    numbers = equation.params["ragged_dot_dimension_numbers"]
    left, right = (_shape(operand) for operand in equation.invars[:2])
    used = {*numbers.dot_dimension_numbers[0][1], *numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in used)


def _times(equation: JaxprEqn) -> int:
    """How often an equation's bodies run; inside a shard_map shapes are one device's."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        mesh, manual = equation.params["mesh"], equation.params["newly_manual_axes"]
        return math.prod(mesh.shape[axis] for axis in manual)
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    return 1


def bodies(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs that an equation runs: a loop's, a choice's, a function's."""
    for value in equation.params.values():
        yield from _jaxprs(value)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    """Every jaxpr in an equation's parameter: closed ones, and those in tuples, too."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape
