"""Which config fields are read, and by whom: a field that nothing reads promises what nobody does."""

import ast
import dataclasses
from collections.abc import Iterator, Mapping

from tests.house import Function, Sources, fits, parse

CONFIG_MODULES = ("*.config", "run")
# A name that says no more than "a config" may be any of them.
ANY_CONFIG = frozenset({"config", "cfg"})

Classes = frozenset[str]
NONE: Classes = frozenset()


@dataclasses.dataclass(frozen=True)
class Configs:
    """Config classes by name. fields: class -> field -> classes it may hold; aliases: name -> the classes it means;
    holders: a field's name, such as optim -> the classes it may hold anywhere; chosen: fields that choose a class."""

    fields: Mapping[str, Mapping[str, Classes]]
    aliases: Mapping[str, Classes]
    holders: Mapping[str, Classes]
    chosen: frozenset[tuple[str, str]]


def unread_fields(sources: Sources) -> Iterator[str]:
    """Fields that no code reads, except to check them; pydantic reads those that choose one of several classes."""
    trees = {module: parse(text) for module, text in sources.items()}
    configs = find_configs(trees)
    read = set(configs.chosen)
    for scope in live_code(trees):
        read |= reads(scope, configs)
    for name, fields in configs.fields.items():
        yield from (f"{name}.{field} is read nowhere" for field in fields if (name, field) not in read)


def find_configs(trees: Mapping[str, ast.Module]) -> Configs:
    """The config classes of the modules that hold some."""
    modules = [tree for module, tree in trees.items() if fits(module, CONFIG_MODULES)]
    classes: dict[str, ast.ClassDef] = {}
    for node in (node for tree in modules for node in tree.body):
        if isinstance(node, ast.ClassDef) and any(names_in(base) & {"Config", *classes} for base in node.bases):
            classes[node.name] = node
    aliases: dict[str, Classes] = {}
    for name, node in classes.items():  # whoever holds a class holds its bases' fields
        aliases[name] = frozenset({name}).union(*(annotated(base, aliases) for base in node.bases))
    for node in (node for tree in modules for node in tree.body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            meant = frozenset().union(*(aliases.get(name, NONE) for name in names_in(node.value)))
            if meant:
                aliases[node.targets[0].id] = meant
    fields: dict[str, dict[str, Classes]] = {}
    holders: dict[str, Classes] = {"run": aliases.get("Run", NONE)}
    chosen = set[tuple[str, str]]()
    for name, node in classes.items():
        fields[name] = {}
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                held = annotated(field.annotation, aliases)
                fields[name][field.target.id] = held
                if held:
                    holders[field.target.id] = holders.get(field.target.id, NONE) | held
                match field.annotation:
                    case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Constant()):
                        chosen.add((name, field.target.id))
    return Configs(fields, aliases, holders, frozenset(chosen))


def names_in(node: ast.AST) -> set[str]:
    """Every plain name in an expression; of a.b, b."""
    return {name for each in ast.walk(node) if (name := terminal(each)) is not None}


def annotated(annotation: ast.expr | None, aliases: Mapping[str, Classes]) -> Classes:
    """The config classes that an annotation mentions."""
    if annotation is None:
        return NONE
    return frozenset().union(*(aliases.get(name, NONE) for name in names_in(annotation)))


@dataclasses.dataclass(frozen=True)
class Scope:
    """A function, class or module; around: what it stands in, the innermost last."""

    node: ast.AST
    around: tuple[ast.AST, ...] = ()
    name: str = ""


def live_code(trees: Mapping[str, ast.Module]) -> list[Scope]:
    """Modules that hold no configs; of those that do, the functions that live code names, unless they only check."""
    live = [Scope(tree) for module, tree in trees.items() if not fits(module, CONFIG_MODULES)]
    waiting: dict[str, list[Scope]] = {}
    for module, tree in trees.items():
        if fits(module, CONFIG_MODULES):
            for scope in definitions(Scope(tree)):
                waiting.setdefault(scope.name, []).append(scope)
    for scope in live:
        for name in names_in(scope.node):
            if not name.startswith(("check", "_check")):
                live += waiting.pop(name, [])
    return live


def definitions(scope: Scope) -> Iterator["Scope"]:
    """The functions and methods of a module, not those inside functions."""
    for node in ast.iter_child_nodes(scope.node):
        if isinstance(node, Function):
            yield Scope(node, (*scope.around, scope.node), node.name)
        elif isinstance(node, ast.ClassDef):
            yield from definitions(Scope(node, (*scope.around, scope.node)))


def reads(scope: Scope, configs: Configs) -> set[tuple[str, str]]:
    """The (class, field) pairs that code reads, as class or whole: x.field, dict(x), getattr(x, name)."""
    found = set[tuple[str, str]]()

    def add(classes: Classes, field: str | None) -> None:
        for name in classes:
            fields = configs.fields.get(name, {})
            found.update((name, each) for each in fields if field in (None, each))

    def visit(node: ast.AST, around: tuple[ast.AST, ...]) -> None:
        def meaning(value: ast.expr) -> Classes:
            return classes_of(value, around, configs)

        match node:
            case ast.Attribute(value=value, attr=field, ctx=ast.Load()):
                anything = (terminal(value) or "").lstrip("_") in ANY_CONFIG and not is_annotated(value, around)
                add(meaning(value) or (frozenset(configs.fields) if anything else NONE), field)
            case ast.Call(func=ast.Name(id="dict"), args=[value]):
                add(meaning(value), None)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str() as field), *_]):
                add(meaning(value), field)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, *_]):
                add(meaning(value), None)
            case ast.MatchClass(cls=cls, kwd_attrs=fields):
                for field in fields:
                    add(annotated(cls, configs.aliases), field)
        inside = (*around, node) if isinstance(node, Function | ast.Lambda | ast.ClassDef | ast.Module) else around
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(scope.node, scope.around)
    return found


def terminal(node: ast.AST) -> str | None:
    """The last name of x or of a.b.x."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


def is_annotated(value: ast.expr, around: tuple[ast.AST, ...]) -> bool:
    """Whether an expression is a parameter whose annotation says what it is."""
    return isinstance(value, ast.Name) and any(
        parameter.annotation is not None for parameter in parameters(around) if parameter.arg == value.id
    )


def parameters(around: tuple[ast.AST, ...]) -> Iterator[ast.arg]:
    """The parameters that can be seen, the innermost function's first."""
    for node in reversed(around):
        if isinstance(node, Function | ast.Lambda):
            yield from (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)


def classes_of(value: ast.expr, around: tuple[ast.AST, ...], configs: Configs, depth: int = 8) -> Classes:
    """The config classes that an expression may be an instance of, as annotations, assignments and names tell."""
    if depth == 0:
        return NONE
    match value:
        case ast.Name(id="self"):
            inner = next((node for node in reversed(around) if isinstance(node, ast.ClassDef)), None)
            return configs.aliases.get(inner.name, NONE) if inner else NONE
        case ast.Name(id=name):
            for parameter in parameters(around):
                if parameter.arg == name and parameter.annotation is not None:
                    return annotated(parameter.annotation, configs.aliases)
            assigned = assignments(name, around)
            meant = [classes_of(each, around, configs, depth - 1) for each in assigned if terminal(each) != name]
            return frozenset().union(*meant) or configs.holders.get(name.lstrip("_"), NONE)
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            inner = next((node for node in reversed(around) if isinstance(node, ast.ClassDef)), None)
            own = class_attribute(inner, name, configs, depth) if inner else NONE
            return own or configs.holders.get(name.lstrip("_"), NONE)
        case ast.Attribute(value=owner, attr=name):
            owners = classes_of(owner, around, configs, depth - 1)
            held = frozenset().union(*(configs.fields.get(each, {}).get(name, NONE) for each in owners))
            return held or configs.holders.get(name.lstrip("_"), NONE)
    return NONE


def assignments(name: str, around: tuple[ast.AST, ...]) -> Iterator[ast.expr]:
    """What is assigned to a name in the functions around, as `name = value`."""
    for node in around:
        if isinstance(node, Function):
            for each in ast.walk(node):
                match each:
                    case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                        yield value


def class_attribute(inner: ast.ClassDef, name: str, configs: Configs, depth: int) -> Classes:
    """The config classes of self.name: from its annotation in the class, or from `self.name = value` in a method."""
    meant = NONE
    for node in inner.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=target), annotation=annotation) if target == name:
                meant |= annotated(annotation, configs.aliases)
            case ast.FunctionDef():
                for each in ast.walk(node):
                    match each:
                        case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=target)], value=value):
                            if target == name:
                                meant |= classes_of(value, (inner, node), configs, depth - 1)
    return meant
