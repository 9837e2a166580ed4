"""The config engine: overrides, mistakes word for word, JSON, files, and every config that ships."""

import itertools
import json
import random
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from annotated_types import Ge, Gt

from llm_jax.config import (
    ABSENT,
    Config,
    ConfigError,
    Difference,
    describe,
    diff,
    from_json,
    load,
    override,
    to_json,
    tree,
)
from llm_jax.data.config import DataConfig, FilesSource, TfdsSource
from llm_jax.field_types import SECTION
from llm_jax.model.config import ModelConfig
from llm_jax.run import Run, check, from_command_line
from llm_jax.train.config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


# A config with what no shipped section has yet: unions in unions, sections that may be null, lists of sections.
class Fast(Config):
    """The default."""

    kind: Literal["fast"] = "fast"
    """Which one."""
    gain: float = 1.0
    """How much."""


class Slow(Config):
    """The other."""

    kind: Literal["slow"] = "slow"
    """Which one."""
    gain: float = 2.0
    """How much."""
    patience: int = 3
    """How long."""


Speed = Annotated[Fast | Slow, pydantic.Field(discriminator="kind")]


class Adam(Config):
    """An optimizer."""

    name: Literal["adam"] = "adam"
    """Which one."""
    lr: Annotated[float, Gt(0)] = 0.1
    """How far."""
    speed: Speed = Slow(patience=5)
    """How fast."""


class Muon(Config):
    """Another optimizer."""

    name: Literal["muon"] = "muon"
    """Which one."""
    lr: Annotated[float, Gt(0)] = 0.2
    """How far."""
    momentum: float = 0.9
    """How long."""
    speed: Speed = Slow(patience=7)
    """How fast."""


class Shape(Config):
    """Two numbers of which one divides the other."""

    width: int = 12
    """All of it."""
    heads: int = 3
    """Parts of it."""
    sizes: tuple[int, ...] = (1, 2)
    """Some numbers."""
    level: Literal[1, 2, 3] | None = None
    """One of a few numbers."""

    @pydantic.model_validator(mode="after")
    def _divides(self) -> "Shape":
        if self.width % self.heads:
            raise ValueError("heads must divide width")
        return self


class Engine(Config):
    """A section with a union in it."""

    speed: Speed = Slow(patience=9)
    """How fast."""


class Whole(Config):
    """All of them."""

    shape: Shape = Shape()
    """A section."""
    optim: Annotated[Adam | Muon, pydantic.Field(discriminator="name")] = Adam(lr=0.5)
    """A union of sections."""
    spare: Shape | None = None
    """A section that may be missing."""
    engine: Engine | None = None
    """Another."""
    parts: tuple[Shape, ...] = ()
    """Sections in a list."""
    title: str = "whole"
    """Text."""
    note: str | None = None
    """Text that may be missing."""
    share: Annotated[float, Ge(0)] | None = 0.5
    """A number that may be missing."""


TENSORS = "'q', 'k', 'v', 'attention_out', 'mlp_gate' or 'mlp_up'"
MLPS = "'swiglu', 'geglu', 'gelu' or 'gelu_tanh'"


def mistakes(config: Config, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        override(config, overrides)
    return list(caught.value.lines)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["model.d_modle=1"], ["model.d_modle: no such field; did you mean d_model?"]),
        (["modle.d_model=1"], ["modle.d_model: no such section; did you mean model?"]),
        (["data.sorce.kind=files"], ["data.sorce.kind: no such section; did you mean source?"]),
        (["d_model=1"], ["d_model: no such field; did you mean model.d_model?"]),
        (["source.kind=files"], ["source.kind: no such section; did you mean data.source?"]),
        (["data.batch_rows=8"], ["data.batch_rows: no such field; did you mean train.batch_rows?"]),
        (["checkpoint.qqq=8"], ["checkpoint.qqq: no such field; checkpoint has every, keep, minutes, permanent_every"]),
        (["modle=1"], ["modle: no such field; did you mean model?"]),
        (["model.d_model.x=1"], ["model.d_model.x: no such field; model.d_model is not a section"]),
        (["model=3"], ["model = 3: model is a section; set its fields, such as model.d_model=..."]),
        (
            ["model.mlp=swigul"],
            [f"model.mlp = 'swigul': must be {MLPS}; did you mean swiglu?"],
        ),
        (
            ["model.mlp=SwiGLU"],
            [f"model.mlp = 'SwiGLU': must be {MLPS}; did you mean swiglu?"],
        ),
        (["model.mlp=3"], [f"model.mlp = '3': must be {MLPS}"]),
        (["model.n_layers=2.5"], ["model.n_layers = 2.5: must be a whole number"]),
        (["model.n_layers=two"], ["model.n_layers = 'two': must be a whole number"]),
        (["model.n_layers=true"], ["model.n_layers = true: must be a whole number"]),
        (["model.n_layers=null"], ["model.n_layers = null: must be a whole number"]),
        (["model.n_layers=0"], ["model.n_layers = 0: must be at least 1"]),
        (["model.qk_norm=1"], ["model.qk_norm = 1: must be true or false"]),
        (["optim.b1=1.5"], ["optim.b1 = 1.5: must be less than 1"]),
        (["optim.lr=0"], ["optim.lr = 0: must be more than 0"]),
        (["optim.final_lr_share=2"], ["optim.final_lr_share = 2: must be at most 1"]),
        (["optim.lr=fast"], ["optim.lr = 'fast': must be a number"]),
        (["optim.clip_norm=off"], ["optim.clip_norm = 'off': must be a number or null"]),
        (["optim.lr=Infinity"], ["optim.lr = Infinity: must be finite"]),
        (["optim.lr=1e999"], ["optim.lr = Infinity: must be finite"]),
        (["optim.lr=NaN"], ["optim.lr = NaN: must be finite"]),
        (["name="], ["name = '': must be text with at least 1 character"]),
        (["name=null"], ["name = null: must be text"]),
        (["name=[1]"], ["name = [1]: must be text"]),
        (["optim.name=adam"], ["optim.name = 'adam': must be 'adamw'; did you mean adamw?"]),
        (
            ["data.source.kind=flies", "data.source.paths=a"],
            ["data.source.kind = 'flies': must be 'stdlib', 'files' or 'tfds'; did you mean files?"],
        ),
        (["data.source.kind=files"], ["data.source.paths: missing; must be a list of text with at least 1 item"]),
        (["data.source.paths=a"], ["data.source.paths: no such field; it belongs to data.source.kind=files"]),
        (
            ["data.source.text_field=a"],
            ["data.source.text_field: no such field; it belongs to data.source.kind=files or tfds"],
        ),
        (
            ["data.source=files"],
            ["data.source = 'files': data.source is a section; set its fields, such as data.source.kind=..."],
        ),
        (['data.source={"paths": ["a"]}'], ["data.source.kind: missing; must be 'stdlib', 'files' or 'tfds'"]),
        (['data.source={"kind": "tfds", "dataset": 3}'], ["data.source.dataset = 3: must be text"]),
        (
            ["data.source.kind=files", "data.source.paths=[a]"],
            [
                "data.source.paths = [a]: is no list; quotes inside a list survive a shell only in quotes: "
                + """'data.source.paths=["a", "b"]'"""
            ],
        ),
        (
            ["data.source.kind=files", "data.source.paths=[]"],
            ["data.source.paths = []: must be a list of text with at least 1 item"],
        ),
        (["data.source.kind=files", 'data.source.paths=["a", 3]'], ["data.source.paths.1 = 3: must be text"]),
        (
            ["model.remat=everything"],
            [f"model.remat = 'everything': must be 'none', 'elementwise', 'dots', 'full' or a list of {TENSORS}"],
        ),
        (
            ['model.remat=["q", "attention"]'],
            [f"model.remat.1 = 'attention': must be {TENSORS}; did you mean attention_out?"],
        ),
        (["model.d_model"], ["model.d_model: an override is path=value, and there is no ="]),
        (["=3"], ["=3: '' is not a path such as model.d_model"]),
        (["model..d_model=3"], ["model..d_model=3: 'model..d_model' is not a path such as model.d_model"]),
        (["train.steps=10", "train.steps=20"], ["train.steps: given twice, as '10' and as '20'"]),
        (["name=\udcff"], ["'name=\\udcff': is not UTF-8"]),
    ],
)
def test_mistakes_are_told_word_for_word(overrides: list[str], lines: list[str]) -> None:
    assert mistakes(Run(), *overrides) == lines


def test_every_mistake_is_told_at_once() -> None:
    lines = mistakes(
        Run(),
        "model.d_modle=1",
        "optim.b1=2",
        "train.steps",
        "modle.x=1",
        "modle.y.z=2",
        "name=a",
        "name=b",
        "model.mlp=x",
    )
    assert sorted(lines) == [
        "model.d_modle: no such field; did you mean d_model?",
        f"model.mlp = 'x': must be {MLPS}",
        "modle.x: no such section; did you mean model?",
        "modle.y.z: no such section; did you mean model?",
        "name: given twice, as 'a' and as 'b'",
        "optim.b1 = 2: must be less than 1",
        "train.steps: an override is path=value, and there is no =",
    ]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "1" * 10_000, "{" * 100_000, "(" * 100_000, "-" * 5_000 + "1", "\\", "'", "1_", "{1, 2}", "2j"],
)
def test_a_value_that_nothing_can_read_is_one_short_line(text: str) -> None:
    (line,) = mistakes(Run(), f"train.steps={text}")
    assert line.startswith("train.steps = ") and line.endswith(": must be a whole number")
    assert len(line) < 150 and "\n" not in line


def value_at(config: Config, path: str) -> Any:
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(
    ("wish", "value"),
    [
        ("name=123", "123"),
        ("name=1e-3", "1e-3"),
        ("name=true", "true"),
        ("name=a=b", "a=b"),
        ("name=a b", "a b"),
        ("name = a ", "a"),
        ('name=" a "', " a "),
        ("name='it'", "it"),
        ("name=1,2", "1,2"),
        ("name=C:\\data", "C:\\data"),
        ("name='C:\\data'", "C:\\data"),
        ("name=größe", "größe"),
        ("train.steps=5e3", 5000),
        ("train.steps=5_000", 5000),
        ("train.steps=2.0", 2),
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1000", 1000.0),
        ("optim.lr=.5", 0.5),
        ("optim.clip_norm=null", None),
        ("optim.clip_norm=None", None),
        ("train.init_from=null", None),
        ("train.init_from=runs/a", "runs/a"),
        ("model.qk_norm=true", True),
        ("model.qk_norm=True", True),
        ("model.qk_norm=false", False),
        ("model.remat=dots", "dots"),
        ('model.remat=["q", "k"]', ("q", "k")),
        ("model.remat=['q']", ("q",)),
        ("model.remat=('q', 'k')", ("q", "k")),
        ("model.remat=[]", ()),
    ],
)
def test_text_becomes_the_value_its_field_means(wish: str, value: object) -> None:
    got = value_at(override(Run(), [wish]), wish.partition("=")[0].strip())
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "paths"), [('["a", "b"]', ("a", "b")), ("corpus/**/*.txt", ("corpus/**/*.txt",)), ("2024", ("2024",))]
)
def test_a_list_of_one_may_be_given_as_its_item(text: str, paths: tuple[str, ...]) -> None:
    run = override(Run(), ["data.source.kind=files", f"data.source.paths={text}"])
    assert run.data.source == FilesSource(paths=paths)


def test_whole_number_choices_are_whole_numbers() -> None:
    assert override(Whole(), ["shape.level=2"]).shape.level == 2
    assert mistakes(Whole(), "shape.level=4") == ["shape.level = 4: must be 1, 2, 3 or null"]


def test_overrides_are_built_once_so_that_halves_need_not_fit() -> None:
    for order in itertools.permutations(["shape.width=35", "shape.heads=5"]):
        assert override(Whole(), order).shape == Shape(width=35, heads=5)
    assert mistakes(Whole(), "shape.width=35") == ["shape: heads must divide width"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.name=muon", "optim.speed.kind=fast", "optim.speed.gain=3", "optim.lr=7", "shape.width=9"],
        ['optim={"name": "muon"}', "optim.momentum=0.5", "optim.speed.patience=1", "spare.width=6", "title=x"],
        ['shape={"width": 8, "heads": 8}', "shape.width=16", "shape.sizes=[3]", "note=null", "share=null"],
        ["optim.name=nadam", "shape.with=1", "title", "spare=3", "share=-1"],
    ],
)
def test_the_order_of_overrides_is_of_no_consequence(overrides: list[str]) -> None:
    def outcome(order: tuple[str, ...]) -> object:
        try:
            return override(Whole(), order)
        except ConfigError as error:
            return sorted(error.lines)

    first = outcome(tuple(overrides))
    assert all(outcome(order) == first for order in itertools.permutations(overrides))


def test_any_fields_in_any_order_come_out_as_given() -> None:
    """Random values for random fields of Run, in two random orders."""
    for seed in range(30):
        rng = random.Random(seed)
        values: dict[str, Any] = {
            "model.n_layers": rng.randint(1, 99),
            "model.qk_norm": rng.choice([True, False]),
            "model.remat": rng.choice(["dots", ["q", "mlp_up"], []]),
            "model.logit_soft_cap": rng.choice([None, 30.0]),
            "optim.lr": rng.uniform(1e-9, 9),
            "optim.schedule": rng.choice(["wsd", "linear"]),
            "data.source.kind": "tfds",
            "data.source.dataset": rng.choice(["lm1b", "123", "a=b", "null ", "[x", "ü"]),
            "train.init_from": rng.choice([None, "runs/x"]),
            "mesh.fsdp": rng.choice([-1, 8]),
        }
        chosen = [*rng.sample(sorted(set(values) - {"data.source.kind", "data.source.dataset"}), 5), "data.source.kind"]
        wishes = [f"{path}={json.dumps(values[path])}" for path in [*chosen, "data.source.dataset"]]
        one = override(Run(), rng.sample(wishes, len(wishes)))
        assert one == override(Run(), rng.sample(wishes, len(wishes)))
        changed = {d.path: d.new for d in diff(tree(Run()), tree(one)) if not d.path.startswith("data.source.")}
        expected = {path: values[path] for path in chosen if not path.startswith("data.source.")}
        assert changed == {path: value for path, value in expected.items() if value != value_at(Run(), path)}
        assert one.data.source == TfdsSource(dataset=values["data.source.dataset"])


def test_another_section_of_a_union_starts_from_its_own_defaults() -> None:
    assert override(Whole(), ["optim.name=muon"]).optim == Muon()
    assert override(Whole(), ["optim.name=muon", "optim.momentum=0.5"]).optim == Muon(momentum=0.5)
    # Below a section that is new, a nested one starts from what the new section says.
    assert override(Whole(), ["optim.name=muon", "optim.speed.gain=4"]).optim == Muon(speed=Slow(gain=4.0, patience=7))
    assert override(Whole(), ["optim.name=muon", "optim.speed.kind=fast"]).optim == Muon(speed=Fast())


def test_the_same_section_of_a_union_keeps_its_values() -> None:
    assert override(Whole(), ["optim.name=adam", "optim.speed.gain=4"]).optim == Adam(
        lr=0.5, speed=Slow(gain=4.0, patience=5)
    )


def test_an_object_replaces_a_section_and_deeper_paths_go_on_top() -> None:
    start = override(Whole(), ["shape.width=24", "shape.heads=4"])
    assert override(start, ['shape={"heads": 6}']).shape == Shape(heads=6)
    assert override(start, ["shape.sizes=[5]", 'shape={"heads": 6}']).shape == Shape(heads=6, sizes=(5,))
    assert override(start, ["shape.sizes=7"]).shape == Shape(width=24, heads=4, sizes=(7,))


def test_a_section_that_may_be_null_appears_when_a_field_is_set() -> None:
    assert override(Whole(), ["spare.width=6"]).spare == Shape(width=6)
    assert override(Whole(), ["engine.speed.gain=4"]).engine == Engine(speed=Slow(gain=4.0, patience=9))
    assert override(Whole(spare=Shape(width=6)), ["spare=null"]).spare is None


def test_sections_in_a_list_are_given_and_told_about_by_number() -> None:
    assert override(Whole(), ['parts=[{"width": 6}, {}]']).parts == (Shape(width=6), Shape())
    assert mistakes(Whole(), 'parts=[{}, {"with": 6}]') == ["parts.1.with: no such field; did you mean width?"]
    assert mistakes(Whole(), 'parts=[{}, {"width": "x"}]') == ["parts.1.width = 'x': must be a whole number"]


def test_override_leaves_the_config_that_it_was_given_alone() -> None:
    before = Whole()
    override(before, ["shape.width=6", "optim.name=muon"])
    assert before == Whole() and override(before, []) == before


UNUSUAL = [
    Run(),
    Run(name='"quoted" \n ☃ größe', seed=2**31 - 1),
    Run(model=ModelConfig(remat=("q", "mlp_up"), logit_soft_cap=1e-300, rope_theta=1e22, norm_eps=0.1 + 0.2)),
    Run(data=DataConfig(source=FilesSource(paths=("a", "**/*.txt")))),
    Run(data=DataConfig(source=TfdsSource(dataset="lm1b", split="train[:10%]", data_dir=None))),
    Run(train=TrainConfig(init_from="runs/x")),
    Whole(optim=Muon(speed=Fast()), spare=Shape(), parts=(Shape(level=2), Shape(sizes=())), share=None),
]


@pytest.mark.parametrize("config", UNUSUAL)
def test_json_gives_back_the_very_same_config(config: Config) -> None:
    text = to_json(config)
    again = from_json(type(config), text)
    assert again == config and to_json(again) == text
    assert json.loads(text) == tree(config)
    assert list(json.loads(text)) == list(type(config).model_fields)


def test_json_is_for_people_too() -> None:
    assert '\n  "name": "größe ☃",\n' in to_json(Run(name="größe ☃"))


@pytest.mark.parametrize("config", UNUSUAL)
def test_what_is_described_can_be_typed_as_an_override(config: Config) -> None:
    rows = [row for row in describe(config) if row.words != SECTION]
    assert override(config, [f"{row.path}={json.dumps(row.value)}" for row in rows]) == config
    for row in rows:
        assert override(config, [f"{row.path}={json.dumps(row.value)}"]) == config


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("{", ["not JSON: EOF while parsing an object at line 1 column 1"]),
        ("[1]", ["[1]: must be an object with the fields of a Run"]),
        ('{"model": {"d_modle": 3}}', ["model.d_modle: no such field; did you mean d_model?"]),
        (
            '{"modle": {}, "seed": "1"}',
            ["seed = '1': must be a whole number", "modle: no such field; did you mean model?"],
        ),
        ('{"train": {"steps": 5.0}}', ["train.steps = 5.0: must be a whole number"]),
    ],
)
def test_json_with_mistakes_is_told_word_for_word(text: str, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(Run, text)
    assert list(caught.value.lines) == lines


def test_diff_names_every_path_that_differs() -> None:
    old = tree(Run())
    new = tree(override(Run(), ["train.steps=7", "model.remat=['q']", "data.source.kind=files", "data.source.paths=a"]))
    assert diff(old, old) == []
    assert diff(old, new) == [
        Difference("model.remat", "elementwise", ["q"]),
        Difference("data.source.kind", "stdlib", "files"),
        Difference("data.source.paths", ABSENT, ["a"]),
        Difference("data.source.text_field", ABSENT, "text"),
        Difference("train.steps", 1000, 7),
    ]
    assert diff({"a": None, "b": 1, "c": {"d": 1}}, {"b": True, "c": 2}) == [
        Difference("a", None, ABSENT),
        Difference("b", 1, True),
        Difference("c", {"d": 1}, 2),
    ]
    assert [str(difference) for difference in diff({"a": None, "b": "x"}, {"b": "y"})] == [
        "a: null -> absent",
        "b: 'x' -> 'y'",
    ]


def test_describe_compares_with_the_default_of_the_parent_or_of_the_section_that_was_chosen() -> None:
    rows = {row.path: row for row in describe(override(Whole(), ["optim.name=muon", "optim.momentum=0.5"]))}
    assert [path for path, row in rows.items() if row.changed] == ["optim.name", "optim.momentum"]
    assert rows["optim.name"].words == "'adam' or 'muon'" and rows["optim.name"].default == "adam"
    assert rows["optim.lr"].default == 0.2 and rows["optim.momentum"].default == 0.9
    assert rows["optim.lr"].words == "a number more than 0"
    assert rows["share"].words == "a number at least 0 or null"
    assert not any(row.changed for row in describe(Whole()))
    assert {row.path: row.default for row in describe(Whole())}["optim.lr"] == 0.5
    required = {row.path: row for row in describe(DataConfig(source=FilesSource(paths=("a",))))}["source.paths"]
    assert required.default is ABSENT and required.changed


def test_every_field_of_a_run_has_a_help() -> None:
    for source in ("kind=stdlib", 'paths=["a"]', "dataset=a"):
        kind = {"p": "files", "d": "tfds", "k": "stdlib"}[source[0]]
        rows = describe(override(Run(), sorted({f"data.source.kind={kind}", f"data.source.{source}"})))
        assert [row.path for row in rows if not row.help.endswith(".")] == []


def test_copies_are_validated() -> None:
    assert ModelConfig().model_copy(update={"d_model": 8}) == ModelConfig(d_model=8)
    for update in ({"d_modle": 8}, {"d_model": "8"}):
        with pytest.raises(pydantic.ValidationError):
            ModelConfig().model_copy(update=update)


HEAD = """\
from llm_jax.model.config import ModelConfig
from llm_jax.data.config import FilesSource
from llm_jax.run import Run
"""


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def confg(): pass\n", "{path}: has no function config(); it must define one that returns a Run"),
        ("config = 3\n", "{path}: has no function config(); it must define one that returns a Run"),
        ("def config(): return {}\n", "{path}: config() returned a dict, not a Run"),
        ("def config(): pass\n", "{path}: config() returned a NoneType, not a Run"),
        ("\ndef config() return 3\n", "{path}, line 2: expected ':'"),
        ("\n\nimport no_such_thing\n", "{path}, line 3: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def config():\n    return 1 / 0\n", "{path}, line 2: ZeroDivisionError: division by zero"),
        ("def config(n): return n\n", "{path}: TypeError: config() missing 1 required positional argument: 'n'"),
        (b"x = '\xff'".decode("latin-1"), "{path}: has no function config(); it must define one that returns a Run"),
        ("import sys\nsys.exit('a\\nb')\n", "{path}, line 2: SystemExit: a b"),
        (
            HEAD + "def config():\n    return Run(model=ModelConfig(d_modle=3))\n",
            "{path}, line 5: ModelConfig.d_modle: no such field; did you mean d_model?",
        ),
        (
            HEAD + "def config():\n    return Run(model=ModelConfig(mlp='swigul'))\n",
            f"{{path}}, line 5: ModelConfig.mlp = 'swigul': must be {MLPS}; did you mean swiglu?",
        ),
        (
            HEAD + "def config():\n    return Run(optim=3)\n",
            "{path}, line 5: Run.optim = 3: must be AdamWConfig(...)",
        ),
        (
            HEAD + "source = FilesSource(paths=['a'])\n",
            '{path}, line 4: FilesSource.paths = ["a"]: must be a tuple, (...) instead of [...]',
        ),
    ],
)
def test_a_config_file_that_fails_is_told_with_its_line(tmp_path: Path, source: str, told: str) -> None:
    path = tmp_path / "made.py"
    path.write_text(source)
    with pytest.raises(ConfigError) as caught:
        load(path, Run)
    assert str(caught.value) == told.format(path=path)


def test_a_config_file_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "quickstart.py").write_text("")
    for name, told in {
        "quikstart.py": f"no such file; did you mean {tmp_path / 'quickstart.py'}?",
        "zzz/x.py": "no such file",
        "train.steps=3": "no such file; the first argument is a config file, and overrides follow it",
        ".": "is a folder; a config is a Python file",
        "a\0b": "cannot be read: embedded null byte",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name, Run)
        assert caught.value.lines == (f"{tmp_path / name}: {told}",)


def test_a_config_file_may_build_on_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(HEAD + "def config(): return Run(name='one', seed=7)\n")
    (tmp_path / "two.py").write_text(
        "from pathlib import Path\nfrom llm_jax.config import load, override\nfrom llm_jax.run import Run\n"
        "def config(): return override(load(Path(__file__).with_name('one.py'), Run), ['name=two'])\n"
    )
    assert load(tmp_path / "two.py", Run) == Run(name="two", seed=7)


def test_the_shipped_configs_are_found() -> None:
    assert {"tiny_causal", "quickstart"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_builds_and_comes_back_from_json(path: Path) -> None:
    run = from_command_line(path, [])
    check(run)
    assert from_json(Run, to_json(run)) == run
    assert run.name == path.stem and run.run_dir == f"runs/{path.stem}"
    assert load(path, Run) == run and "\n    llm-jax " in path.read_text()


def test_a_run_from_the_command_line_is_checked_across_sections() -> None:
    tiny = CONFIGS[[path.stem for path in CONFIGS].index("tiny_causal")]
    with pytest.raises(ConfigError) as caught:
        from_command_line(tiny, ["mesh.tensor=3"])
    assert caught.value.lines == ("model.d_ff = 176 is not divisible by mesh.tensor = 3",)
    for mesh in (["mesh.tensor=4", "mesh.fsdp=2"], ["mesh.context=2", "mesh.fsdp=2", "mesh.tensor=2"], ["mesh.fsdp=8"]):
        from_command_line(tiny, mesh)
