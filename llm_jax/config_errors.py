"""Mistakes in a config, one line each, in the words of whoever typed it. Imports no jax."""

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pydantic

from llm_jax.field_types import LIMITS, SECTION, Accepts, Arm, accepts, either, number, words

_LIMITS = {
    "greater_than": "gt",
    "greater_than_equal": "ge",
    "less_than": "lt",
    "less_than_equal": "le",
    "multiple_of": "multiple_of",
}
_LONGEST_VALUE = 80


class Place(NamedTuple):
    """Where an error is: its path, what the field accepts (None: no such field), its section, the union around that."""

    path: tuple[str, ...]
    accepts: Accepts | None
    section: type[pydantic.BaseModel]
    union: Accepts | None


def lines(error: pydantic.ValidationError, root: type[pydantic.BaseModel], *, where: str = "") -> list[str]:
    """One line for each mistake; where, such as "ModelConfig.", comes before each path."""
    found: dict[tuple[str, ...], list[str]] = {}
    for detail in error.errors(include_url=False):
        place = _locate(root, detail["loc"])
        found.setdefault(place.path, list(_tell(detail, place, root, where)))
    # A list among several alternatives is told about by its wrong items, not by what else it might have been.
    parents = {path[:-1] for path in found if path and path[-1].isdigit()}
    return [line for path, told in found.items() if path not in parents for line in told]


def show(value: Any) -> str:
    """A value as it is typed: text in quotes, everything else as JSON, cut short when it is long."""
    if isinstance(value, str):
        shown = repr(value)
    else:
        shown = json.dumps(value, ensure_ascii=False, default=lambda thing: type(thing).__name__)
    return shown if len(shown) <= _LONGEST_VALUE else shown[:_LONGEST_VALUE] + "..."


def _locate(root: type[pydantic.BaseModel], loc: Sequence[int | str]) -> Place:
    """Follows pydantic's location, which names the arms of unions too, along the fields."""
    here, section, union, path = Accepts((Arm(root, ()),)), root, None, []
    for part in loc:
        if here.discriminator:
            union = here
            here = Accepts((Arm(here.by_tag[str(part)], ()),))
        elif here.sections:
            section = here.sections[0]
            path.append(str(part))
            if part not in section.model_fields:
                return Place(tuple(path), None, section, union if union and section in union.sections else None)
            here = accepts(section.model_fields[str(part)])
        elif isinstance(part, int) and here.items:
            path.append(str(part))
            here = here.items
        elif here.values:
            path.append(str(part))
            here = here.values
        # What is left names an arm of a union without discriminator.
    return Place(tuple(path), here, section, union)


def _tell(detail: Any, place: Place, root: type[pydantic.BaseModel], where: str) -> Iterator[str]:
    path, value, kind = where + ".".join(place.path), detail["input"], detail["type"]
    if kind == "json_invalid":
        yield f"not JSON: {detail['ctx']['error']}"
    elif kind == "value_error":  # a section's own check across its fields
        yield f"{path}: {detail['ctx']['error']}".removeprefix(": ")
    elif not place.path:
        yield f"{show(value)}: must be an object with the fields of a {root.__name__}"
    elif place.accepts is None:
        for below in _leaves(value):
            what = "section" if below else "field"
            yield f"{'.'.join([path, *below])}: no such {what}; {_hint(place, root)}"
    elif kind == "missing":
        yield f"{path}: missing; must be {words(place.accepts)}"
    elif where and place.accepts.sections:  # in Python, where sections are objects
        made = either([f"{section.__name__}(...)" for section in place.accepts.sections])
        yield f"{path} = {show(value)}: must be {made}"
    elif kind.startswith("union_tag"):
        yield _tell_tag(path, value, place.accepts)
    elif place.accepts.sections:
        first = next(iter(place.accepts.sections[0].model_fields))
        yield f"{path} = {show(value)}: {path} is {SECTION}; set its fields, such as {path}.{first}=..."
    elif kind in _LIMITS:
        key = _LIMITS[kind]
        yield f"{path} = {show(value)}: must be {LIMITS[key]} {number(detail['ctx'][key])}"
    elif kind in ("too_short", "string_too_short"):
        yield f"{path} = {show(value)}: must be {words(place.accepts)}"
    elif kind == "finite_number":
        yield f"{path} = {show(value)}: must be finite"
    elif kind == "tuple_type" and isinstance(value, list):
        yield f"{path} = {show(value)}: must be a tuple, (...) instead of [...]"
    elif kind == "tuple_type" and isinstance(value, str) and value.startswith("["):
        example = f'{path}=["a", "b"]'
        yield f"{path} = {value}: is no list; quotes inside a list survive a shell only in quotes: '{example}'"
    else:
        must = words(place.accepts, limits=False)
        yield f"{path} = {show(value)}: must be {must}{_choice_hint(value, place.accepts.choices)}"


def _tell_tag(path: str, value: Any, union: Accepts) -> str:
    """What is wrong with the field that tells a union's sections apart."""
    tags, name = tuple(union.by_tag), union.discriminator
    options = either([repr(tag) for tag in tags])
    if not isinstance(value, dict):
        return f"{path} = {show(value)}: {path} is {SECTION}; set its fields, such as {path}.{name}={tags[0]}"
    if name not in value:
        return f"{path}.{name}: missing; must be {options}"
    return f"{path}.{name} = {show(value[name])}: must be {options}{_choice_hint(value[name], tags)}"


def _choice_hint(value: Any, choices: Sequence[Any]) -> str:
    by_lower = {choice.lower(): choice for choice in choices if isinstance(choice, str)}
    close = difflib.get_close_matches(value.lower(), by_lower, n=1) if isinstance(value, str) else []
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def _hint(place: Place, root: type[pydantic.BaseModel]) -> str:
    """What an unknown name may have meant: a field of a sibling section, a similar name here, or the same elsewhere."""
    name, section = place.path[-1], ".".join(place.path[:-1])
    if place.union:
        tags = [tag for tag, sibling in place.union.by_tag.items() if name in sibling.model_fields]
        if tags:
            return f"it belongs to {section}.{place.union.discriminator}={either(tags)}"
    close_here = {field: _likeness(name, field) for field in place.section.model_fields}
    elsewhere = {path: _likeness(name, path.rsplit(".", 1)[-1]) for path in _paths(root, "")}
    best_here = max(close_here, key=close_here.__getitem__)
    best_elsewhere = max(elsewhere, key=elsewhere.__getitem__)
    # A name from elsewhere must be much the better one.
    if close_here[best_here] >= max(0.6, elsewhere[best_elsewhere] - 0.1):
        return f"did you mean {best_here}?"
    if elsewhere[best_elsewhere] >= 0.75:
        return f"did you mean {best_elsewhere}?"
    return f"{section or root.__name__} has {', '.join(place.section.model_fields)}"


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _paths(section: type[pydantic.BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for below in accepts(field).sections:
            yield from _paths(below, f"{prefix}{name}.")


def _leaves(value: Any) -> Iterator[list[str]]:
    """The paths below a value that was given for an unknown name; [] for the value itself."""
    if not isinstance(value, dict) or not value:
        yield []
        return
    for name, below in value.items():
        for rest in _leaves(below):
            yield [str(name), *rest]
