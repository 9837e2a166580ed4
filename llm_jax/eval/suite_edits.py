"""One-edit corruptions of Python source, and why each is one: it does not parse, or a name means nothing there."""

import ast
import builtins
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

CLOSER = {"(": ")", "[": "]", "{": "}"}
OPENER = {closer: opener for opener, closer in CLOSER.items()}
# How many lines a bracket that is closed far away is above, at least and at most.
FAR_LINES = range(2, 16)

HEADER = re.compile(r"^ *(if|elif|else|for|while|def|class|try|except|finally|with)\b.*:$")
QUOTED = re.compile(r"""(["'])[^"'\\]*\1""")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Edit(NamedTuple):
    """Of line number `line`, the characters [start, stop) become `new`; `needs` stands in what is shown before it."""

    line: int
    start: int
    stop: int
    new: str
    needs: str = ""


class Unit(NamedTuple):
    """A function or method that stands in no other: its lines are [first, stop), decorators left out."""

    node: FunctionNode
    first: int
    stop: int
    bound: frozenset[str]
    """Names that it, or what stands in it, gives a meaning to."""
    attributes: frozenset[str] | None
    """What self may have there; None where that cannot be known, or there is no class."""


class Source(NamedTuple):
    """A document that parses: its lines without their ends, its functions, and what its names mean."""

    lines: Sequence[str]
    units: Sequence[Unit]
    bound: frozenset[str]
    """Names that any function gives a meaning to."""
    outside: frozenset[str] | None
    """Names of the module, of its classes and of Python itself; None where that cannot be known."""
    attributes: frozenset[str]
    """Of whatever object."""


def read_source(text: str) -> Source | None:
    """The text as Python, None where it is not."""
    # The parser counts these as line ends too, or knows them in other places than we do.
    if "\r" in text or "\f" in text:
        return None
    tree = parsed(text)
    if tree is None:
        return None
    nodes = list(ast.walk(tree))
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    known = {node: _attributes(node, classes) for node in classes.values()}
    units = [
        Unit(node, node.lineno - 1, node.end_lineno or node.lineno, _bound(node), known.get(owner) if owner else None)
        for node, owner in _functions(tree)
    ]
    unknown = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in nodes)
    return Source(
        text.split("\n"),
        units,
        frozenset().union(*(unit.bound for unit in units)),
        None if unknown else frozenset(_bound_outside(tree)) | frozenset(dir(builtins)),
        frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute)),
    )


def parsed(text: str) -> ast.Module | None:
    """What compile() reads in a text; None where it says that it is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def edited(line: str, edit: Edit) -> str:
    """The line with the edit."""
    return line[: edit.start] + edit.new + line[edit.stop :]


def breaks(source: Source, unit: Unit, edit: Edit) -> bool:
    """Whether the function around the edit parses without it, and does not with it."""
    lines = list(source.lines[unit.first : unit.stop])
    # A method stands indented: anything that begins a block makes it whole again.
    header = "if True:\n" if lines[0].startswith(" ") else ""
    if parsed(header + "\n".join(lines)) is None:
        return False
    lines[edit.line - unit.first] = edited(source.lines[edit.line], edit)
    return parsed(header + "\n".join(lines)) is None


def _functions(node: ast.AST, owner: ast.ClassDef | None = None) -> Iterator[tuple[FunctionNode, ast.ClassDef | None]]:
    for below in ast.iter_child_nodes(node):
        if isinstance(below, FunctionNode):
            yield below, owner
        else:
            yield from _functions(below, below if isinstance(below, ast.ClassDef) else owner)


def missing_colon(source: Source, unit: Unit) -> Iterator[Edit]:
    """The colon that ends a block's first line is not there."""
    for n, line in _body(source, unit):
        if HEADER.match(line):
            yield Edit(n, len(line) - 1, len(line), "")


def wrong_indent(source: Source, unit: Unit) -> Iterator[Edit]:
    """A line stands four columns too far to the right or to the left."""
    for n, line in _body(source, unit):
        yield Edit(n, 0, 0, "    ")
        if line.startswith("        "):
            yield Edit(n, 0, 4, "")


def dropped_bracket(source: Source, unit: Unit) -> Iterator[Edit]:
    """A bracket that was opened in the line is not closed."""
    for n, line in _body(source, unit):
        for at in _closed_here(line):
            yield Edit(n, at, at + 1, "")


def wrong_bracket(source: Source, unit: Unit) -> Iterator[Edit]:
    """A bracket that was opened in the line is closed by one of another kind."""
    for n, line in _body(source, unit):
        for at in _closed_here(line):
            yield from (Edit(n, at, at + 1, other) for other in OPENER if other != line[at])


def far_bracket(source: Source, unit: Unit) -> Iterator[Edit]:
    """A bracket that was opened two lines above or more is closed by one of another kind, or not at all."""
    for n, line in _body(source, unit):
        at = next((at for at, char in enumerate(line) if char in CLOSER or char in OPENER), None)
        if at is not None and line[at] in OPENER and _opened_far(source.lines, n, line[at]):
            yield from (Edit(n, at, at + 1, other) for other in (*OPENER, "") if other != line[at])


def wrong_quote(source: Source, unit: Unit) -> Iterator[Edit]:
    """A string is closed by the other quotation mark."""
    for n, line in _body(source, unit):
        for found in QUOTED.finditer(line):
            yield Edit(n, found.end() - 1, found.end(), "'" if found[1] == '"' else '"')


def _body(source: Source, unit: Unit) -> Iterator[tuple[int, str]]:
    """The lines of a function below its first one, by number, that are neither blank nor comments."""
    for n in range(unit.first + 1, unit.stop):
        line = source.lines[n]
        if line.strip() and not line.lstrip().startswith("#"):
            yield n, line


def _closed_here(line: str) -> Iterator[int]:
    """Where a line closes brackets that it has opened, strings being looked at like all else."""
    held: list[str] = []
    for at, char in enumerate(line):
        if char in CLOSER:
            held.append(char)
        elif char in OPENER and held and held.pop() == OPENER[char]:
            yield at


def _opened_far(lines: Sequence[str], n: int, closer: str) -> bool:
    """Whether the bracket that line n closes first was opened FAR_LINES above."""
    depth = 0
    for above in range(1, min(FAR_LINES.stop, n + 1)):
        for char in reversed(lines[n - above]):
            if char in OPENER:
                depth += 1
            elif char in CLOSER:
                if depth == 0:
                    return above in FAR_LINES and CLOSER[char] == closer
                depth -= 1
    return False


def out_of_scope_name(source: Source, unit: Unit) -> Iterator[Edit]:
    """A local name is one of another function instead, which nothing here defines: not this function, nor the module,
    nor Python itself."""
    if source.outside is None:
        return
    loads = [node for node in ast.walk(unit.node) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    others = sorted(source.bound - unit.bound - source.outside - {node.id for node in loads})
    here = unit.bound - {"self", "cls", unit.node.name}
    for node in loads:
        if node.id in here:
            yield from _replaced(source, unit, node, node.id, others)


def wrong_attribute(source: Source, unit: Unit) -> Iterator[Edit]:
    """An attribute of self is one of other objects in the file instead, which self has nowhere: neither its class nor
    the classes below that in the file know it, and all of these are in the file."""
    if unit.attributes is None:
        return
    others = sorted(source.attributes - unit.attributes)
    for node in ast.walk(unit.node):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Load()) if not name.startswith("__"):
                yield from _replaced(source, unit, node, name, others, before="self.")


def _attributes(node: ast.ClassDef, classes: dict[str, ast.ClassDef], depth: int = 8) -> frozenset[str] | None:
    """What self may have: what the class and its bases say of it or define; None where that cannot be known."""
    known = set(dir(object))
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id == "object":
            continue
        below = classes.get(base.id) if isinstance(base, ast.Name) else None
        inherited = _attributes(below, classes, depth - 1) if below is not None and depth else None
        if inherited is None:
            return None
        known |= inherited
    if node.keywords:
        return None
    for each in ast.walk(node):
        match each:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                known.add(name)
            case ast.FunctionDef(name="__getattr__" | "__getattribute__"):
                return None
            case ast.Name(id=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                known.add(name)
            case ast.ClassDef(name=name) | ast.Constant(value=str() as name):
                known.add(name)
    return frozenset(known)


def _replaced(
    source: Source, unit: Unit, node: ast.expr, name: str, others: Sequence[str], before: str = ""
) -> Iterator[Edit]:
    """A name at the end of an expression becomes one of several; four of them, the same ones each time."""
    n, stop = (node.end_lineno or 0) - 1, node.end_col_offset or 0
    start = stop - len(name)
    line = source.lines[n]
    # Columns count bytes, and inside f-strings older versions of Python count something else.
    if n <= unit.first or not line.isascii() or line[start:stop] != name or not line[:start].endswith(before):
        return
    draw = random.Random(f"{n} {start} {name}")
    for other in draw.sample(others, min(len(others), 4)):
        yield Edit(n, start, stop, other, needs=before + name)


def _bound(node: ast.AST) -> frozenset[str]:
    """Every name that a function, or what stands in it, gives a meaning to."""
    return frozenset[str]().union(*map(_binds, ast.walk(node)))


def _binds(node: ast.AST) -> set[str]:
    """The names that one node by itself gives a meaning to."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
            return {name}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.ExceptHandler(name=str() as name) | ast.MatchAs(name=str() as name):
            return {name}
        case ast.MatchStar(name=str() as name) | ast.MatchMapping(rest=str() as name):
            return {name}
        case ast.alias(name=name, asname=asname):
            return {asname or name.partition(".")[0]}
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            return set(names)
    return set()


def _bound_outside(node: ast.AST) -> set[str]:
    """Names of a module and of its classes, those included that functions make global."""
    names = set[str]()
    for below in ast.iter_child_nodes(node):
        names |= _binds(below)
        if isinstance(below, FunctionNode):
            names.update(*(each.names for each in ast.walk(below) if isinstance(each, ast.Global)))
        else:
            names |= _bound_outside(below)
    return names


Candidates = Callable[[Source, Unit], Iterator[Edit]]


class Kind(NamedTuple):
    """A kind of corruption: what may be edited, and whether it is proved by what does not parse."""

    candidates: Candidates
    unparsable: bool


KINDS: dict[str, Kind] = {
    "missing colon": Kind(missing_colon, True),
    "wrong indent": Kind(wrong_indent, True),
    "dropped bracket": Kind(dropped_bracket, True),
    "wrong bracket": Kind(wrong_bracket, True),
    "wrong quote": Kind(wrong_quote, True),
    "far bracket": Kind(far_bracket, True),
    "name out of scope": Kind(out_of_scope_name, False),
    "wrong attribute": Kind(wrong_attribute, False),
}
