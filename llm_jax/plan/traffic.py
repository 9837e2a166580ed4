"""How many bytes a compiled program moves between a device's main memory and its arithmetic, and its largest arrays."""

from collections.abc import Iterator
from typing import NamedTuple

from llm_jax.plan.hlo import Buffer, Computation, Instruction, Program, called_by, executions, operand_buffers, total

# What hands arrays on without touching them, or is counted where it begins.
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all")
    + ("partition-id", "replica-id", "add-dependency", "opt-barrier", "domain")
)
# What XLA calls to say where an array lies, or what is true of it.
_NAMES = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
# Instructions that read a part of their first operand: as much as they result in.
_PARTIAL = ("dynamic-slice", "slice", "gather")


class Temporary(NamedTuple):
    """An array that the program makes on its way."""

    bytes: int
    what: str
    """Its type and shape, and the operation of the model that it comes from."""


def moved_bytes(program: Program) -> int:
    """Bytes that a device reads and writes in its main memory in one run.

    Each instruction reads its operands and writes its results, a fusion as one; of what is only sliced, or updated in
    part, the part. Arrays that XLA put on the chip cost nothing. Layouts' padding and what caches save are not seen.
    """
    found = executions(program)
    return sum(e.times * _moved(e.instruction, e.computation, program) for e in found if not e.fused)


def largest_temporaries(program: Program, n: int) -> list[Temporary]:
    """The n largest arrays that instructions make in main memory, each of its kind once; many may never be there at the
    same time."""
    found: dict[str, int] = {}
    for execution in executions(program):
        instruction = execution.instruction
        if execution.fused or instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        for buffer in instruction.result:
            if buffer.space == 0:
                dims = ",".join(str(size) for size in buffer.dims)
                found[f"{buffer.dtype}[{dims}] {_origin(instruction)}"] = buffer.bytes
    largest = sorted(found.items(), key=lambda item: -item[1])[:n]
    return [Temporary(size, what) for what, size in largest]


def _moved(instruction: Instruction, computation: Computation, program: Program) -> int:
    opcode, made = instruction.opcode, instruction.result
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and any(f'custom_call_target="{name}"' in instruction.attributes for name in _NAMES):
        return 0
    operands = [_main(buffers) for buffers in operand_buffers(instruction, computation)]
    if opcode == "copy-start":
        # Its result is (to, from, a semaphore).
        return operands[0] + _main(made[:1])
    if opcode.endswith("-start"):
        if opcode != "fusion-start" and called_by(instruction, program):
            return 0  # what it starts is counted
        if (started := opcode.removesuffix("-start")) not in ("fusion", *_PARTIAL):
            return 2 * sum(operands)
        # Its result is (the operands, what it makes, a word).
        given = sum(len(buffers) for buffers in operand_buffers(instruction, computation))
        opcode, made = started, made[given:-1]
    result = _main(made)
    if opcode in _PARTIAL:
        return (total(made) if operands[0] else 0) + result
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "scatter":
        return 3 * sum(operands[len(operands) // 2 + 1 :])
    if opcode == "fusion":
        return _of_fusion(instruction, operands, result, program)
    return sum(operands) + result


def _of_fusion(instruction: Instruction, operands: list[int], result: int, program: Program) -> int:
    """What a fusion moves of operands and a result of so many bytes."""
    inner = _called(instruction, program)
    if inner is None:
        return sum(operands) + result
    reads = sum(min(_read(inner, i, program), whole) if whole else 0 for i, whole in enumerate(operands))
    return reads + min(_written(inner, program), result)


def _called(instruction: Instruction, program: Program) -> Computation | None:
    name = instruction.attributes.partition("calls=")[2].split(",")[0].strip().lstrip("%")
    return program.computations.get(name)


def _read(fused: Computation, place: int, program: Program) -> int:
    """Bytes that a fusion reads of its operand at a place."""
    parameter = next(
        (i for i in fused.instructions.values() if i.opcode == "parameter" and i.arguments.strip() == str(place)), None
    )
    return 0 if parameter is None else _read_of(parameter, fused, program)


def _read_of(source: Instruction, fused: Computation, program: Program) -> int:
    """Bytes that are read of what an instruction of a fusion hands on."""
    read, whole = 0, total(source.result)
    for user in _users(source, fused):
        at = user.operands.index(source.name)
        if user.opcode in _PARTIAL and at == 0:
            read += total(user.result)
        elif user.opcode == "dynamic-update-slice" and at == 0:
            continue  # the rest of it stays where it is
        elif user.opcode == "bitcast":
            read += _read_of(user, fused, program)
        elif user.opcode == "fusion" and (inner := _called(user, program)) is not None:
            read += _read(inner, at, program)
        else:
            return whole
    return min(read, whole)


def _written(fused: Computation, program: Program) -> int:
    """Bytes that a fusion writes: of an array that it updates in place, the update."""

    def written(instruction: Instruction | None, computation: Computation) -> int:
        if instruction is None:
            return 0
        if instruction.opcode == "tuple":
            return sum(written(computation.instructions.get(name), computation) for name in instruction.operands)
        if instruction.opcode == "bitcast":
            return written(computation.instructions.get(instruction.operands[0]), computation)
        if instruction.opcode == "dynamic-update-slice":
            return total(operand_buffers(instruction, computation)[1])
        if instruction.opcode == "fusion" and (inner := _called(instruction, program)) is not None:
            return written(inner.instructions.get(inner.root), inner)
        return total(instruction.result)

    return written(fused.instructions.get(fused.root), fused)


def _users(source: Instruction, computation: Computation) -> Iterator[Instruction]:
    return (i for i in computation.instructions.values() if source.name in i.operands)


def _main(buffers: tuple[Buffer, ...]) -> int:
    """Bytes of those in main memory."""
    return sum(buffer.bytes for buffer in buffers if buffer.space == 0)


def _origin(instruction: Instruction) -> str:
    """The operation of the model that an instruction was made for: the last parts of its path."""
    path = instruction.attributes.partition('op_name="')[2].partition('"')[0]
    return "/".join(path.split("/")[-2:]) if path else instruction.opcode
