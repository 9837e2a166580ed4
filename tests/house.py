"""The house rules as functions from source text to violations, one line each; test_house.py holds llm_jax to them."""

import ast
import fnmatch
import functools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

# Module name -> its text; a package's own is package.__init__.
Sources = Mapping[str, str]
# Module name -> what it imports: modules of its own package, and other packages' first names.
Graph = Mapping[str, tuple[set[str], set[str]]]

# The first pattern that fits a module says on which floor it is; imports go down, or stay where they are.
FLOORS = (
    (6, ("*.cli", "sweep.*", "plan.*", "launch.*", "convert.*", "report.*", "inspection.*", "show_config")),
    (0, ("*.config", "alphabet", "exit_codes", "field_types", "config_errors", "command_line")),
    (0, ("mesh", "distributed", "early_signals", "batch", "processes", "manifest", "named_arrays", "durable")),
    (1, ("model.*", "optim.*", "data.*")),
    (2, ("objective.*", "checkpoint", "run_directory", "guards", "train.state", "train.step", "train.spikes")),
    (3, ("run",)),
    (4, ("eval.*",)),
    (5, ("train.*",)),
    (7, ("__main__",)),
)
SIBLINGS = 1  # on this floor, packages never import each other

# What answers before JAX is imported, and what that may import beside the standard library.
JAX_FREE = ("*.config", "alphabet", "run", "exit_codes", "field_types", "config_errors", "command_line", "show_config")
JAX_FREE_IMPORTS = frozenset({"pydantic", "pydantic_core", "annotated_types"})

VAGUE_NAMES = frozenset(
    {"util", "utils", "common", "base", "helper", "helpers", "misc", "shared", "core", "lib", "tools"}
    | {"registry", "registries", "callbacks", "hooks"}
)
UNSAFE_MODULES = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
UNSAFE_CALLS = frozenset({"eval", "exec", "__import__"})

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Every check reads the same texts, and none changes a tree.
parse = functools.cache(ast.parse)


def read_sources(package: Path) -> dict[str, str]:
    """Every module below a package's folder."""
    paths = sorted(package.rglob("*.py"))
    return {".".join(path.relative_to(package.parent).with_suffix("").parts): path.read_text() for path in paths}


def fits(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name, without the package's, fits one of the patterns; *.config is config too."""
    name = module.partition(".")[2]
    return any(fnmatch.fnmatchcase(name, p) or (p.startswith("*.") and name == p[2:]) for p in patterns)


def floor(module: str) -> int | None:
    """The floor of a module, or None if it was given none."""
    return next((number for number, patterns in FLOORS if fits(module, patterns)), None)


def import_graph(sources: Sources) -> Graph:
    """What each module imports, inside its functions too."""
    return {module: imports(module, sources) for module in sources}


def imports(module: str, sources: Sources) -> tuple[set[str], set[str]]:
    """What one module imports: modules of its own package, and other packages' first names."""
    own = module.partition(".")[0]
    inside, outside = set[str](), set[str]()
    for node in ast.walk(parse(sources[module])):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                # `from package import name` imports a module, or a name out of one.
                base = module.split(".")[: -node.level] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                below = [f"{source}.{alias.name}" for alias in node.names]
                names = [name if name in sources else source for name in below]
            case _:
                continue
        for name in names:
            (inside if name.partition(".")[0] == own else outside).add(name)
    return inside & sources.keys(), {name.partition(".")[0] for name in outside}


def chains_from(module: str, graph: Graph) -> Iterator[tuple[str, ...]]:
    """Every module that a module imports, directly or not, as a shortest chain of imports that leads there."""
    chains = [(module,)]
    seen = {module}
    for chain in chains:
        yield chain
        below = sorted(graph[chain[-1]][0] - seen)
        seen.update(below)
        chains += [(*chain, each) for each in below]


def upward_imports(sources: Sources) -> Iterator[str]:
    """Imports of a higher floor, or of a sibling package; and modules that were given no floor."""
    for module, (inside, _) in import_graph(sources).items():
        if is_package(module):
            continue
        here = floor(module)
        if here is None:
            yield f"{module} is on no floor"
            continue
        for other in sorted(inside):
            there = floor(other)
            if there is not None and there > here:
                yield f"{module} (floor {here}) imports {other} (floor {there})"
            elif there == here == SIBLINGS and module.split(".")[1] != other.split(".")[1]:
                yield f"{module} imports its sibling {other}"


def is_package(module: str) -> bool:
    """Whether a module is an __init__.py."""
    return module.endswith(".__init__")


def cycles(sources: Sources) -> Iterator[str]:
    """Modules that import themselves by way of others."""
    graph = import_graph(sources)
    for module in graph:
        for chain in chains_from(module, graph):
            if module in graph[chain[-1]][0] and module == min(chain):
                yield " imports ".join((*chain, module))


def jax_before_its_time(sources: Sources) -> Iterator[str]:
    """Modules that have to answer without JAX, and import, directly or not, more than they may."""
    graph = import_graph(sources)
    allowed = JAX_FREE_IMPORTS | sys.stdlib_module_names
    for module in graph:
        if fits(module, JAX_FREE):
            for chain in chains_from(module, graph):
                for package in sorted(graph[chain[-1]][1] - allowed):
                    yield " imports ".join((*chain, package))


def evaluation_that_trains(sources: Sources) -> Iterator[str]:
    """Modules of eval that import, directly or not, something of train beside its config."""
    graph = import_graph(sources)
    for module in graph:
        if fits(module, ("eval.*",)):
            for chain in chains_from(module, graph):
                if fits(chain[-1], ("train.*",)) and not fits(chain[-1], ("train.config",)):
                    yield " imports ".join(chain)


def full_packages(sources: Sources) -> Iterator[str]:
    """Packages whose __init__.py is not empty."""
    yield from (f"{module} is not empty" for module, text in sources.items() if is_package(module) and text)


def vague_names(sources: Sources) -> Iterator[str]:
    """Modules and packages named for nothing in particular."""
    names = {part for module in sources for part in module.split(".") if part != "__init__"}
    yield from (f"{name}: say what it is about" for name in sorted(names) if name.strip("_") in VAGUE_NAMES)


def too_long(sources: Sources, allowed: Mapping[str, str]) -> Iterator[str]:
    """Files and functions past their length, and reasons in allowed (name -> why) that nothing needs any more."""
    needed = set[str]()
    for module, text in sources.items():
        sizes = {module: (text.count("\n"), MAX_FILE_LINES)}
        for function in functions(text):
            sizes[f"{module}.{function.name}"] = (n_lines(function), MAX_FUNCTION_LINES)
        for name, (lines, most) in sizes.items():
            if lines > most:
                needed.add(name)
                if name not in allowed:
                    yield f"{name} has {lines} lines, more than {most}"
    yield from (f"{name} is short enough: its exception can go" for name in allowed.keys() - needed)


def functions(text: str) -> list[Function]:
    """Every function and method of a module, nested ones too."""
    return [node for node in ast.walk(parse(text)) if isinstance(node, Function)]


def n_lines(function: Function) -> int:
    """The lines of a function, without its decorators."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def unsafe(sources: Sources, allowed: Collection[str]) -> Iterator[str]:
    """Text that becomes code, and pickles; allowed holds "module: what"."""
    for module, text in sources.items():
        for node in ast.walk(parse(text)):
            match node:
                case ast.Call(func=ast.Name(id=name)) if name in UNSAFE_CALLS:
                    found = f"{module}: {name}"
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    found = f"{module}: allow_pickle"
                case _:
                    continue
            if found not in allowed:
                yield found
        for package in sorted(imports(module, sources)[1] & UNSAFE_MODULES):
            yield f"{module}: {package}"


def open_arguments(sources: Sources, allowed: Collection[str]) -> Iterator[str]:
    """Functions that take **anything and so hide what they need; allowed holds their names."""
    for module, text in sources.items():
        for function in functions(text):
            if function.args.kwarg and f"{module}.{function.name}" not in allowed:
                yield f"{module}.{function.name} takes **{function.args.kwarg.arg}"
