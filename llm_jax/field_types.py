"""What a config field accepts: the alternatives of its annotation, in words, and read from text. Imports no jax."""

import ast
import json
import types
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

SECTION = "a section"
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "text", bool: "true or false"}
LIMITS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most", "multiple_of": "a multiple of"}


class Arm(NamedTuple):
    """One alternative: a plain type, a Literal, tuple[...], dict[str, ...] or config class, and limits on its value."""

    kind: Any
    limits: tuple[Any, ...]


class Accepts(NamedTuple):
    """Everything a field accepts; the discriminator is the field that tells its sections apart."""

    arms: tuple[Arm, ...]
    nullable: bool = False
    discriminator: str | None = None

    @property
    def sections(self) -> tuple[type[pydantic.BaseModel], ...]:
        """The config classes among the arms."""
        return tuple(arm.kind for arm in self.arms if _is_section(arm.kind))

    @property
    def by_tag(self) -> dict[str, type[pydantic.BaseModel]]:
        """Each value of the discriminator, and its section."""
        if self.discriminator is None:
            return {}
        return {
            tag: section
            for section in self.sections
            for tag in get_args(section.model_fields[self.discriminator].annotation)
        }

    @property
    def tags(self) -> "Accepts":
        """What the discriminator accepts, over all sections."""
        return Accepts((Arm(Literal[tuple(self.by_tag)], ()),))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of the Literals among the arms."""
        return tuple(value for arm in self.arms if get_origin(arm.kind) is Literal for value in get_args(arm.kind))

    @property
    def items(self) -> "Accepts | None":
        """What one item of the list among the arms accepts; None where there is no list."""
        for arm in self.arms:
            if get_origin(arm.kind) is tuple:
                return _flatten(get_args(arm.kind)[0], ())
        return None

    @property
    def values(self) -> "Accepts | None":
        """What one value of the mapping among the arms accepts; None where there is no mapping."""
        for arm in self.arms:
            if get_origin(arm.kind) is dict:
                return _flatten(get_args(arm.kind)[1], ())
        return None


def accepts(field: FieldInfo) -> Accepts:
    """What a field of a config class accepts."""
    found = _flatten(field.annotation, tuple(field.metadata))
    return found._replace(discriminator=field.discriminator) if isinstance(field.discriminator, str) else found


def words(accepts: Accepts, *, limits: bool = True) -> str:
    """What is accepted, as the end of a sentence that begins with "must be"."""
    if accepts.sections:
        return SECTION
    parts = [repr(choice) for choice in accepts.choices]
    for arm in accepts.arms:
        if get_origin(arm.kind) is not Literal:
            parts.append(" ".join([_kind_words(arm.kind), " and ".join(limit_words(arm)) if limits else ""]).rstrip())
    return either([*parts, "null"] if accepts.nullable else parts)


def limit_words(arm: Arm) -> list[str]:
    """Each limit on an arm's value in words, such as "less than 1"."""
    found = [
        f"{said} {number(getattr(limit, key))}"
        for limit in arm.limits
        for key, said in LIMITS.items()
        if hasattr(limit, key)
    ]
    unit = "character" if arm.kind is str else "item"
    for limit in arm.limits:
        if least := getattr(limit, "min_length", 0):
            found.append(f"with at least {least} {unit}{'s' * (least > 1)}")
    return found


def either(parts: Sequence[str]) -> str:
    """a, b or c."""
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def number(value: float) -> str:
    """A number as people write it: 1, not 1.0."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


def read(text: str, accepts: Accepts) -> Any:
    """The value that text on a command line means for a field, unchecked.

    JSON, then Python's literals (None, True, ['a'], 1_000), else the text itself. What the field accepts decides where
    that is open: text fields keep 123 as text, whole-number fields take 5e3, and a list may be given as its only item.
    """
    value = read_alone(text)
    kinds = [arm.kind for arm in accepts.arms]
    if accepts.items and len(kinds) == 1 and not isinstance(value, list | None) and text[:1] != "[":
        return [read(text, accepts.items)]
    if value is None or isinstance(value, str) or _fits(value, accepts):
        return value
    if text[:1] not in ("[", "{") and (str in kinds or any(isinstance(choice, str) for choice in accepts.choices)):
        return text
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return int(value)
    return value


def read_alone(text: str) -> Any:
    """The value of text whose field is unknown."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # a backslash in text is no mistake
            value = ast.literal_eval(text)
        return json.loads(json.dumps(value)) if text[0] in "([" or not isinstance(value, tuple) else text
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # sets, bytes and complex numbers too: they are no JSON


def _fits(value: Any, accepts: Accepts) -> bool:
    kinds = [arm.kind for arm in accepts.arms]
    match value:
        case bool():
            return bool in kinds or value in accepts.choices
        case int():
            return int in kinds or float in kinds or value in accepts.choices
        case list():
            return accepts.items is not None
        case _:
            return type(value) in kinds


def _flatten(annotation: Any, limits: Sequence[Any]) -> Accepts:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        found = _flatten(inner, (*metadata, *limits))
        tags = [meta.discriminator for meta in metadata if isinstance(meta, FieldInfo) and meta.discriminator]
        return found._replace(discriminator=tags[0]) if tags else found
    if origin is Union or origin is types.UnionType:
        parts = [_flatten(arm, limits) for arm in get_args(annotation)]
        tags = [part.discriminator for part in parts if part.discriminator]
        arms = tuple(arm for part in parts for arm in part.arms)
        return Accepts(arms, any(part.nullable for part in parts), tags[0] if tags else None)
    if annotation is None or annotation is types.NoneType:
        return Accepts((), nullable=True)
    return Accepts((Arm(annotation, tuple(limits)),))


def _kind_words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        item = _flatten(get_args(kind)[0], ())
        plurals = [_PLURALS.get(arm.kind, getattr(arm.kind, "__name__", str(arm.kind))) for arm in item.arms]
        return "a list of " + (words(item) if item.choices else " or ".join(plurals))
    if get_origin(kind) is dict:
        return f"a mapping of names to {words(_flatten(get_args(kind)[1], ()))}"
    return _WORDS.get(kind, str(kind))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
