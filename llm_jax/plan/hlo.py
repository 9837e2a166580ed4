"""The text of a compiled program (XLA's HLO), read as far as a plan needs it: what runs, how often, on which arrays."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Buffer(NamedTuple):
    """An array of the program, as one device has it."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    """Where it lies: 0 is the device's main memory, others are on the chip, or the host's."""

    @property
    def bytes(self) -> int:
        """Its size without a layout's padding."""
        return math.ceil(math.prod(self.dims) * _bits(self.dtype) / 8)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Buffer, ...]
    """A tuple's arrays, nested ones too, in order."""
    operands: tuple[str, ...]
    attributes: str
    """All after the operands."""
    arguments: str
    """The operands as they are written: a constant's value, a parameter's number."""


class Computation(NamedTuple):
    """A function of the program: its instructions by name, in order; the root's name."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


class Program(NamedTuple):
    """Every computation by name, and those where a run begins."""

    computations: Mapping[str, Computation]
    entries: tuple[str, ...]


class Execution(NamedTuple):
    """An instruction of a run of the program."""

    instruction: Instruction
    computation: Computation
    times: int
    """How often it runs: once, but in loops as often as they turn."""
    fused: bool
    """Whether it is a part of a fusion, which reads and writes memory as one."""


_BUFFER = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# What kernels say of themselves goes over several lines, and some of these begin with braces too.
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_BITS = re.compile(r"[a-z]+(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
# What an instruction of each kind runs; others name functions of single numbers, to reduce or sort by.
_CALLS = {
    "while": ("body",),
    "fusion": ("calls",),
    "call": ("to_apply",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "custom-call": ("called_computations", "calls"),
    "async": ("calls", "to_apply", "called_computations"),
}


def parse(text: str) -> Program:
    """The program of a text as `compiled.as_text()` gives it."""
    computations: dict[str, Computation] = {}
    entries: list[str] = []
    name, instructions, root = "", dict[str, Instruction](), ""
    for line in text.splitlines():
        if not line.startswith((" ", "\t")):
            header = _HEADER.match(line)
            if header:
                name, instructions, root = header[2], {}, ""
                entries += [name] if header[1] else []
            elif name and _END.match(line):
                computations[name] = Computation(name, instructions, root)
                name = ""
        elif name and (found := _LINE.match(line)):
            operands, attributes = _split(found[5])
            read = tuple(re.findall(r"%([\w.\-]+)", operands))
            instructions[found[2]] = Instruction(
                found[2], found[4], tuple(buffers(found[3])), read, attributes, operands
            )
            root = found[2] if found[1] else root
    return Program(computations, tuple(entries))


def buffers(shape: str) -> Iterator[Buffer]:
    """The arrays of a shape as HLO writes it."""
    for dtype, dims, layout in _BUFFER.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        yield Buffer(dtype, sizes, int(space[1]) if space else 0)


def executions(program: Program) -> Iterator[Execution]:
    """All that a run does, in no order; both sides of a condition. A loop of unknown length counts once."""
    pending = [(entry, 1, False) for entry in program.entries]
    while pending:
        name, times, fused = pending.pop()
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            yield Execution(instruction, computation, times, fused)
            turns = (trip_count(instruction, computation, program) or 1) if instruction.opcode == "while" else 1
            within = fused or instruction.opcode in ("fusion", "fusion-start")
            pending += [(called, times * turns, within) for called in called_by(instruction, program)]


def called_by(instruction: Instruction, program: Program) -> list[str]:
    """The computations that an instruction runs; of an asynchronous one its start does."""
    opcode = instruction.opcode
    if opcode.endswith(("-done", "-update")):
        return []
    names = []
    for attribute in _CALLS.get("async" if opcode.endswith("-start") else opcode, ()):
        if found := re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes):
            names += re.findall(r"[\w.\-]+", found[1])
    # A collective's function of two numbers is no part of the run.
    return [] if opcode.startswith("all-reduce") else [name for name in names if name in program.computations]


def unknown_loops(program: Program) -> list[str]:
    """The loops whose number of turns the text does not tell."""
    found = executions(program)
    return [
        e.instruction.name
        for e in found
        if e.instruction.opcode == "while" and trip_count(e.instruction, e.computation, program) is None
    ]


def trip_count(loop: Instruction, computation: Computation, program: Program) -> int | None:
    """How often a while loop turns: as XLA says, else from its condition `i < n`; None where neither tells."""
    if told := _TRIPS.search(loop.attributes):
        return int(told[1])
    name = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
    if name is None or name[1] not in program.computations:
        return None
    condition = program.computations[name[1]]
    root = condition.instructions.get(condition.root)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes or len(root.operands) != 2:
        return None
    counter, limit = (condition.instructions.get(operand) for operand in root.operands)
    if counter is None or limit is None or limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    place = re.search(r"index=(\d+)", counter.attributes)
    first = _initial(loop, computation, int(place[1])) if place else None
    return None if first is None else max(int(limit.arguments) - first, 0)


def _initial(loop: Instruction, computation: Computation, place: int) -> int | None:
    """What a loop's counter begins with: JAX's loops begin with 0 where nothing else is written."""
    start = computation.instructions.get(loop.operands[0])
    if start is None or start.opcode != "tuple" or place >= len(start.operands):
        return 0
    value = computation.instructions.get(start.operands[place])
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
        value = computation.instructions.get(value.operands[0])
    if value is None or value.opcode != "constant":
        return 0
    return int(value.arguments) if value.arguments.lstrip("-").isdigit() else None


def operand_buffers(instruction: Instruction, computation: Computation) -> list[tuple[Buffer, ...]]:
    """The arrays of each operand."""
    known = computation.instructions
    return [known[operand].result if operand in known else () for operand in instruction.operands]


def total(arrays: Sequence[Buffer]) -> int:
    """Bytes of all of them."""
    return sum(array.bytes for array in arrays)


def _split(rest: str) -> tuple[str, str]:
    """What stands in the parenthesis that is open, and what comes after it."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _bits(dtype: str) -> int:
    """Bits of a number: what a type's name ends in; a flag takes a byte, a token nothing."""
    if dtype == "pred":
        return 8
    found = _BITS.match(dtype)
    return int(found[1]) if found else 0
