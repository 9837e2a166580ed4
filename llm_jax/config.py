"""A run's configuration: frozen sections, read from a Python file, overridden by path=value, kept as JSON. No jax."""

import difflib
import enum
import json
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from llm_jax import config_errors, field_types
from llm_jax.config_errors import show
from llm_jax.exit_codes import USAGE, Failure
from llm_jax.field_types import SECTION, Accepts, Arm, accepts, words


class ConfigError(Failure, ValueError):
    """Mistakes of the user's, each told in one line: the path, the value and the fix."""

    exit_code = USAGE

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class Config(pydantic.BaseModel):
    """One section of a run: frozen, no unknown fields, no silent conversions; a field's docstring is its help."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, validated like any other (pydantic's own is not, and would lose a typo)."""
        return type(self)(**{**dict(self), **(update or {})})


C = TypeVar("C", bound=Config)


class Absent(enum.Enum):
    """What stands where a tree has no value, since null is one."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


class Row(NamedTuple):
    """One field of a config; of a section only the path, words and help are of interest."""

    path: str
    words: str
    """What the field accepts."""
    value: Any
    default: Any
    """ABSENT where the field has none."""
    help: str

    @property
    def changed(self) -> bool:
        """Whether the value is not the default's."""
        return not _same(self.value, self.default)


class Difference(NamedTuple):
    """A path at which two trees differ; ABSENT on the side that has none."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("absent" if side is ABSENT else show(side) for side in (self.old, self.new))
        return f"{self.path}: {old} -> {new}"


def load(path: str | Path, cls: type[C]) -> C:
    """What the function config() of a Python file returns, which must be a cls.

    The file is executed, so it must be trusted like any other program. Raises ConfigError, whatever is wrong with it.
    """
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {_why_unreadable(Path(path), error)}") from None
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102  a config is a program
        make = module.__dict__.get("config")
        config = make() if callable(make) else None
    except (Exception, SystemExit) as error:
        raise ConfigError(*_tell_failure(error, str(path))) from error
    if not callable(make):
        raise ConfigError(f"{path}: has no function config(); it must define one that returns {_a(cls.__name__)}")
    if not isinstance(config, cls):
        raise ConfigError(f"{path}: config() returned {_a(type(config).__name__)}, not {_a(cls.__name__)}")
    return config


def override(config: C, overrides: Sequence[str]) -> C:
    """The config with every path=value applied, in whatever order they are given; validated once, at the end.

    A section takes a JSON object, which replaces it; a deeper path then goes on top of that. A new value of the field
    that tells a union's sections apart starts from the new section's defaults. Values: `field_types.read`.
    Raises ConfigError with a line for each mistake.
    """
    wishes, lines = _wishes(overrides)
    section = Accepts((Arm(type(config), ()),))
    merged = _merge(section, tree(config), wishes, "", lines)
    try:
        config = _validate(type(config), json.dumps(merged))
    except ConfigError as error:
        lines += error.lines
    if lines:
        raise ConfigError(*lines)
    return config


def tree(config: Config) -> dict[str, Any]:
    """The config as JSON's types: what `diff` compares."""
    return config.model_dump(mode="json")


def to_json(config: Config) -> str:
    """The config as indented JSON, fields in the order of their classes."""
    return json.dumps(tree(config), indent=2, ensure_ascii=False) + "\n"


def from_json(cls: type[C], text: str | bytes) -> C:
    """The config that `to_json` wrote. Raises ConfigError with a line for each mistake."""
    return _validate(cls, text)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every path at which two trees differ, in the order of the old one, then of the new one."""
    return list(_diff(old, new, ""))


def describe(config: Config) -> list[Row]:
    """Every section and field, each with what it accepts, its value, its default and its help.

    A section's default is what its parent says; of another class of the same union it is that class's own.
    """
    return list(_describe(type(config), tree(config), _defaults(type(config)), ""))


def _a(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _why_unreadable(path: Path, error: OSError | ValueError) -> str:
    if path.is_dir():
        return "is a folder; a config is a Python file"
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if "=" in path.name:
        return "no such file; the first argument is a config file, and overrides follow it"
    beside = sorted(str(file) for file in path.parent.glob("*.py"))
    close = difflib.get_close_matches(str(path), beside, n=1)
    return f"no such file{f'; did you mean {close[0]}?' if close else ''}"


def _tell_failure(error: Exception | SystemExit, path: str) -> list[str]:
    """What a config file raised, with the line that did."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return [f"{path}, line {error.lineno}: {error.msg}"]
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path}, line {numbers[-1]}: " if numbers else f"{path}: "
    if isinstance(error, ConfigError):
        return [where + line for line in error.lines]
    if isinstance(error, pydantic.ValidationError):
        root = next((cls for cls in _subclasses(Config) if cls.__name__ == error.title), Config)
        return [where + line for line in config_errors.lines(error, root, where=f"{error.title}.")]
    told = " ".join(str(error).split())
    return [f"{where}{type(error).__name__}{f': {told}' if told else ''}"]


def _subclasses(cls: type[Config]) -> Iterator[type[Config]]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


def _validate(cls: type[C], text: str | bytes) -> C:
    try:
        return cls.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise ConfigError(*config_errors.lines(error, cls)) from None


def _wishes(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The overrides as one tree of names, in which "" holds a path's own text; and what is wrong with them."""
    wishes: dict[str, Any] = {}
    lines = []
    for wish in overrides:
        path, equals, text = (part.strip() for part in wish.partition("="))
        if not equals:
            lines.append(f"{wish}: an override is path=value, and there is no =")
        elif not all(path.split(".")):
            lines.append(f"{wish}: {path!r} is not a path such as model.d_model")
        elif any("\ud800" <= char <= "\udfff" for char in wish):
            lines.append(f"{wish!a}: is not UTF-8")
        else:
            node = wishes
            for name in path.split("."):
                node = node.setdefault(name, {})
            if "" in node:
                lines.append(f"{path}: given twice, as {show(node[''])} and as {show(text)}")
            node[""] = text
    return wishes, lines


def _merge(field: Accepts, value: Any, wishes: Mapping[str, Any], path: str, lines: list[str]) -> Any:
    """A field's value with the wishes for it and below it; what cannot be validated later is added to lines."""
    if "" in wishes:
        value = field_types.read(wishes[""], field)
    below = {name: wish for name, wish in wishes.items() if name}
    if below and not field.sections:
        lines.append(f"{path}.{next(iter(below))}: no such field; {path} is not a section")
    if not below or not field.sections or not isinstance(value, dict | None):
        return value
    section, value = _choose_section(field, value or {}, below)
    prefix = f"{path}." if path else ""
    for name, wish in below.items():
        known = section.model_fields.get(name) if section else None
        if known:
            value[name] = _merge(accepts(known), value.get(name), wish, prefix + name, lines)
        elif section:
            value[name] = _unknown(wish)
    return value


def _choose_section(
    field: Accepts, value: dict[str, Any], wishes: Mapping[str, Any]
) -> tuple[type[pydantic.BaseModel] | None, dict[str, Any]]:
    """The class that a section is to have, None where its tag is wrong, and its values, from defaults if it is new."""
    if field.discriminator is None:
        return field.sections[0], {**_defaults(field.sections[0]), **value}
    tag = value.get(field.discriminator)
    if "" in wishes.get(field.discriminator, {}):
        wanted = field_types.read(wishes[field.discriminator][""], field.tags)
        value = value if wanted == tag else {field.discriminator: wanted}
        tag = wanted
    section = field.by_tag.get(tag) if isinstance(tag, str) else None
    return section, {**(_defaults(section) if section else {}), **value}


def _unknown(wishes: Mapping[str, Any]) -> Any:
    """What was wished for a name that does not exist: kept, so that validation tells of it with all the rest."""
    below = {name: _unknown(wish) for name, wish in wishes.items() if name}
    return below or field_types.read_alone(wishes[""])


def _defaults(section: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {name: _default(field) for name, field in section.model_fields.items() if not field.is_required()}


def _default(field: FieldInfo) -> Any:
    return to_jsonable_python(field.get_default(call_default_factory=True))


def _short(field: Accepts, value: Any) -> Any:
    """A value in which the sections of a list have only the fields that differ from their class's defaults."""
    section = field.items.sections[0] if field.items and field.items.sections else None
    if section is None or not isinstance(value, list):
        return value
    defaults = _defaults(section)
    return [{k: v for k, v in item.items() if not _same(v, defaults.get(k, ABSENT))} for item in value]


def _diff(old: Any, new: Any, path: str) -> Iterator[Difference]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _diff(old.get(name, ABSENT), new.get(name, ABSENT), f"{path}.{name}" if path else name)
    elif not _same(old, new):
        yield Difference(path, old, new)


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _describe(
    section: type[pydantic.BaseModel], values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str
) -> Iterator[Row]:
    for name, info in section.model_fields.items():
        field, path, help = accepts(info), prefix + name, " ".join((info.description or "").split())
        value, default = values[name], defaults.get(name, ABSENT)
        if not field.sections or not isinstance(value, dict):
            said = f"{SECTION} or null" if field.sections else words(field)
            yield Row(path, said, _short(field, value), _short(field, default), help)
            continue
        yield Row(path, SECTION, None, None, help)
        tag = field.discriminator
        below = field.by_tag[value[tag]] if tag else field.sections[0]
        if not isinstance(default, dict):
            default = {} if tag else _defaults(below)
        if tag and default.get(tag) != value[tag]:
            default = {**_defaults(below), tag: default.get(tag, ABSENT)}
        for row in _describe(below, value, default, f"{path}."):
            yield row._replace(words=words(field.tags)) if tag and row.path == f"{path}.{tag}" else row
