"""llm_jax keeps the house rules, and each check of them sees its rule broken."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import house, house_fields

ROOT = Path(__file__).parents[1]
SOURCES = house.read_sources(ROOT / "llm_jax")

# What may be longer than the rule says, and why.
LONG: dict[str, str] = {}
# A run is a Python file, and loading it runs it.
UNSAFE = {"llm_jax.config: exec"}
# JAX calls who listens with whatever an event carries.
OPEN_ARGUMENTS = {"llm_jax.train.recompiles.compiled"}


def too_long(sources: house.Sources) -> Iterator[str]:
    return house.too_long(sources, LONG)


def unsafe(sources: house.Sources) -> Iterator[str]:
    return house.unsafe(sources, UNSAFE)


def open_arguments(sources: house.Sources) -> Iterator[str]:
    return house.open_arguments(sources, OPEN_ARGUMENTS)


Check = Callable[[house.Sources], Iterator[str]]
CHECKS = (
    house.upward_imports,
    house.cycles,
    house.jax_before_its_time,
    house.evaluation_that_trains,
    house.full_packages,
    house.vague_names,
    house_fields.unread_fields,
    too_long,
    unsafe,
    open_arguments,
)


@pytest.mark.parametrize("check", CHECKS)
def test_llm_jax_keeps_the_rule(check: Check) -> None:
    assert list(check(SOURCES)) == []


def test_the_package_was_found() -> None:
    assert {"llm_jax.__main__", "llm_jax.model.config", "llm_jax.train.step", "llm_jax.data.__init__"} <= SOURCES.keys()


PLANTED = {
    "up": (
        house.upward_imports,
        {"model.layers": "from llm_jax.train import loop", "train.loop": ""},
        ["llm_jax.model.layers (floor 1) imports llm_jax.train.loop (floor 5)"],
    ),
    "up, inside a function": (
        house.upward_imports,
        {"checkpoint": "def f():\n    import llm_jax.run", "run": ""},
        ["llm_jax.checkpoint (floor 2) imports llm_jax.run (floor 3)"],
    ),
    "up, relative": (
        house.upward_imports,
        {"eval.scorer": "from ..report import page", "report.page": ""},
        ["llm_jax.eval.scorer (floor 4) imports llm_jax.report.page (floor 6)"],
    ),
    "sibling": (
        house.upward_imports,
        {"optim.chain": "from llm_jax.model.weights import Weight", "model.weights": ""},
        ["llm_jax.optim.chain imports its sibling llm_jax.model.weights"],
    ),
    "no floor": (house.upward_imports, {"attic": "", "cellar.wine": ""}, ["llm_jax.attic", "llm_jax.cellar.wine"]),
    "cycle": (
        house.cycles,
        {
            "data.a": "from llm_jax.data import b",
            "data.b": "from llm_jax.data.c import f",
            "data.c": "def f():\n    from llm_jax.data import a",
        },
        ["llm_jax.data.a imports llm_jax.data.b imports llm_jax.data.c imports llm_jax.data.a"],
    ),
    "jax in a config": (
        house.jax_before_its_time,
        {"run": "import llm_jax.model.config", "model.config": "from jax import numpy"},
        ["llm_jax.run imports llm_jax.model.config imports jax", "llm_jax.model.config imports jax"],
    ),
    "numpy in a config": (
        house.jax_before_its_time,
        {"config": "import numpy as np"},
        ["llm_jax.config imports numpy"],
    ),
    "evaluation trains": (
        house.evaluation_that_trains,
        {"eval.scorer": "import llm_jax.model.layers", "model.layers": "import llm_jax.train.state", "train.state": ""},
        ["llm_jax.eval.scorer imports llm_jax.model.layers imports llm_jax.train.state"],
    ),
    "full package": (
        house.full_packages,
        {"model.__init__": "from llm_jax.model.layers import Block"},
        ["llm_jax.model"],
    ),
    "vague": (house.vague_names, {"train.utils": "", "helpers.__init__": ""}, ["helpers: say", "utils: say"]),
    "long file": (too_long, {"run": "\n" * 401}, ["llm_jax.run has 401 lines, more than 400"]),
    "long function": (
        too_long,
        {"run": "class A:\n    def f(self):\n" + "        pass\n" * 60},
        ["llm_jax.run.f has 61 lines, more than 60"],
    ),
    "eval": (unsafe, {"run": "x = eval('1')"}, ["llm_jax.run: eval"]),
    "exec": (unsafe, {"data.loader": "def f(text):\n    exec(text)"}, ["llm_jax.data.loader: exec"]),
    "pickle": (unsafe, {"data.loader": "from pickle import loads"}, ["llm_jax.data.loader: pickle"]),
    "pickle by numpy": (unsafe, {"run": "np.load(path, allow_pickle=True)"}, ["llm_jax.run: allow_pickle"]),
    "open arguments": (open_arguments, {"run": "def f(x, **rest): pass"}, ["llm_jax.run.f takes **rest"]),
}


def planted(modules: dict[str, str]) -> dict[str, str]:
    return {f"llm_jax.{name}": text for name, text in modules.items()}


@pytest.mark.parametrize(("check", "modules", "expected"), PLANTED.values(), ids=PLANTED)
def test_a_broken_rule_is_seen(check: Check, modules: dict[str, str], expected: list[str]) -> None:
    found = list(check(planted(modules)))
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


KEPT = {
    "train.loop": "from llm_jax.train.step import make_step\nfrom llm_jax.objective import causal",
    "train.step": "from llm_jax.objective import causal",
    "objective.causal": "from llm_jax.model.config import ModelConfig",
    "model.config": "from llm_jax.config import Config",
    "config": "import dataclasses",
    "eval.scorer": "from llm_jax.train.config import MeshConfig",
    "train.config": "from llm_jax.config import Config",
    "train.__init__": "",
    "optim.chain": "from llm_jax.model.config import ModelConfig",
    "report.cli": "import pickles_and_preserves\nx = model.eval()\nnp.load(path, allow_pickle=False)",
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_kept_rule_is_left_alone(check: Check) -> None:
    assert list(check(planted(KEPT))) == []


def test_an_exception_that_nothing_needs_is_seen() -> None:
    assert list(house.too_long(planted({"run": ""}), {"llm_jax.run.f": "was long"})) == [
        "llm_jax.run.f is short enough: its exception can go"
    ]


CONFIGS = {
    "config": "class Config: ...",
    "optim.config": """
from llm_jax.config import Config
class Adam(Config):
    name: Literal["adam"] = "adam"
    lr: float = 1.0
    decay: float = 0.1
    @property
    def rate(self): return self.lr
    def check(self): assert self.decay
class Muon(Adam):
    name: Literal["muon"] = "muon"
    beta: float = 0.9
Optim = Annotated[Adam | Muon, Field(discriminator="name")]
""",
    "run": """
from llm_jax.config import Config
class Mesh(Config):
    data: int = 1
    every: int = 1
class Log(Config):
    every: int = 1
class Run(Config):
    optim: Optim = Adam()
    mesh: Mesh = Mesh()
    log: Log = Log()
def check(run): return run.log.every
def sizes(mesh): return dict(mesh)
""",
}
EVERY_OTHER = "def f(run: Run):\n    run.optim.rate, run.optim.decay, run.optim.beta, run.mesh.data, run.mesh.every\n"


@pytest.mark.parametrize(
    ("reader", "unread"),
    [
        (
            "",
            "Adam.lr Adam.decay Muon.beta Mesh.data Mesh.every Log.every Run.optim Run.mesh Run.log",
        ),
        # A field of the same name in another section is no use, nor is a check, nor an attribute of something else.
        (EVERY_OTHER, "Log.every Run.log"),
        (EVERY_OTHER + "    check(run)", "Log.every Run.log"),
        (EVERY_OTHER + "    run.log.every", ""),
        (EVERY_OTHER + "def g(run: Run, log: logging.Logger):\n    run.log, log.every", "Log.every"),
        (EVERY_OTHER + "def g(run: Run, timer: Timer):\n    run.log, timer.every", "Log.every"),
        # The ways of reading: a parameter, a local name, an attribute, a whole section, a pattern.
        (EVERY_OTHER + "def g(run: Run, c: Log | None):\n    run.log, c.every", ""),
        (EVERY_OTHER + "def g(run):\n    mine = run.log\n    def h(): return mine.every", ""),
        (
            EVERY_OTHER
            + "class A:\n    def __init__(self, c: Log): self.c = c\n    def f(self, run): run.log, self.c.every",
            "",
        ),
        (EVERY_OTHER + "class A:\n    c: Log\n    def f(self, run): return run.log, self.c.every", ""),
        (EVERY_OTHER + "def g(run: Run):\n    for name in 'ab': getattr(run.log, name)", ""),
        (EVERY_OTHER + "def g(run: Run):\n    match run.log:\n        case Log(every=n): pass", ""),
        (EVERY_OTHER + "def g(run, config): return run.log, config.every", ""),
        (EVERY_OTHER.replace("rate, run.optim.", "") + "def g(run, m: Muon): return run.log.every, m.lr", ""),
        # A whole section is read by a function beside the configs that somebody calls.
        ("def f(run): run.optim, run.log.every, sizes(run.mesh)\ndef g(o: Optim): o.beta, o.decay, o.rate", ""),
        (
            "def f(run): run.optim, run.log.every, run.mesh\ndef g(o: Optim): o.beta, o.decay, o.rate",
            "Mesh.data Mesh.every",
        ),
        ("def f(run): run.optim, run.log.every, dict(run.mesh)\ndef g(o: Optim): o.beta, o.decay", "Adam.lr"),
    ],
)
def test_unread_fields_are_found(reader: str, unread: str) -> None:
    sources = planted(CONFIGS | {"train.loop": reader})
    assert list(house_fields.unread_fields(sources)) == [f"{field} is read nowhere" for field in unread.split()]


def test_a_run_is_imported_without_jax() -> None:
    statement = "import sys, llm_jax.run; print(sorted({'jax', 'flax', 'optax', 'numpy'} & set(sys.modules)))"

    def imported(before: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", before + statement]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert imported("") == "[]\n"
    assert "jax" in imported("import jax; "), "the test above could not fail"
