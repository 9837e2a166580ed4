"""The default suite: each pair is one edit of a document, proved wrong; the same for everyone; and no kind is free."""

import ast
import builtins
import functools
import symtable
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import BOS_ID, TokenizerConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval import suite as suite_module
from llm_jax.eval.requests import Likelihood, Pair
from llm_jax.eval.suite import Corruption, Suite, fewer_tokens_wins, make_suite, score_suite
from llm_jax.eval.suite_edits import (
    KINDS,
    Candidates,
    edited,
    far_bracket,
    out_of_scope_name,
    parsed,
    read_source,
    wrong_attribute,
)
from llm_jax.eval.tasks import untrained
from llm_jax.optim.config import AdamWConfig
from llm_jax.train.state import init_state
from tests.small import CFG, mesh_of

SEQ_LEN = 96
UNPARSABLE = [name for name, kind in KINDS.items() if kind.unparsable]


@pytest.fixture(scope="module", autouse=True)
def few_pairs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_module, "PAIRS", 22)
        patch.setattr(suite_module, "MASKED_PAIRS", 22)
        yield


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "email/message.py", "ftplib.py", "codecs.py")
    return [(name, (root / name).read_text(encoding="utf-8")) for name in names]


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    return tokenizers.train([text for _, text in texts], TokenizerConfig(), 1024)


@pytest.fixture(scope="module")
def suite(texts, tokenizer) -> Suite:
    made = make_suite(texts, tokenizer, SEQ_LEN, 0)
    assert made is not None
    return made


def test_every_kind_is_there_and_no_pair_is_longer_than_a_row(suite):
    assert suite.pairs.keys() == KINDS.keys() and suite.left_out == {}
    for name, pairs in suite.pairs.items():
        assert 20 <= len(pairs) <= suite_module.PAIRS, name
        assert len({(pair.document, pair.line) for pair in pairs}) == len(pairs), name
        for pair in pairs:
            assert max(len(pair.good), len(pair.bad)) <= SEQ_LEN + 1
            assert pair.good[0] == pair.bad[0] == BOS_ID and pair.good != pair.bad
        assert fewer_tokens_wins(pairs) == 0.5, name


def test_a_good_text_is_the_document_s_and_a_bad_one_differs_in_one_line(suite, texts, tokenizer):
    for name, pairs in suite.pairs.items():
        for pair in pairs:
            good, bad = tokenizer.decode(pair.good), tokenizer.decode(pair.bad)
            document = dict(texts)[pair.document]
            assert good in document
            two = list(zip(good.split("\n"), bad.split("\n"), strict=True))
            (changed,) = [n for n, (a, b) in enumerate(two) if a != b]
            assert two[changed][0] == document.split("\n")[pair.line], name
            # The line after the edited one is there, and context before it.
            assert changed >= 1 and changed >= len(two) - 3


def with_edit(document: str, pair: Corruption, tokenizer: Tokenizer) -> str:
    """The whole document with the pair's wrong line."""
    lines = document.split("\n")
    two = zip(tokenizer.decode(pair.good).split("\n"), tokenizer.decode(pair.bad).split("\n"), strict=True)
    (lines[pair.line],) = [bad for good, bad in two if good != bad]
    return "\n".join(lines)


@pytest.mark.parametrize("name", UNPARSABLE)
def test_the_whole_document_does_not_compile_with_the_edit(suite, texts, tokenizer, name):
    for pair in suite.pairs[name]:
        document = dict(texts)[pair.document]
        assert parsed(document) is not None
        assert parsed(with_edit(document, pair, tokenizer)) is None, (pair.document, pair.line)


def test_what_is_out_of_scope_is_known_nowhere_by_the_compiler_s_own_tables(suite, texts, tokenizer):
    """With the edit the function has a global name that neither the module nor Python defines."""
    for pair in suite.pairs["name out of scope"]:
        document = dict(texts)[pair.document]
        fresh = free_names(with_edit(document, pair, tokenizer)) - free_names(document)
        known = {symbol.get_name() for symbol in symtable.symtable(document, "x", "exec").get_symbols()}
        assert len(fresh) == 1 and not fresh & (known | set(dir(builtins))), (pair.document, pair.line, fresh)


def free_names(text: str) -> set[str]:
    """Every name that some function takes for a global one."""
    found, tables = set[str](), [symtable.symtable(text, "x", "exec")]
    for table in tables:
        tables += table.get_children()
        # A plain word until Python 3.13, and since then a member of an enumeration that prints as one.
        if str(table.get_type()).rpartition(".")[2].lower() == "function":
            found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return found


def test_it_is_the_same_whatever_the_order_and_another_for_another_seed(suite, texts, tokenizer, monkeypatch):
    assert make_suite(reversed(texts), tokenizer, SEQ_LEN, 0) == suite
    monkeypatch.setattr(suite_module, "KINDS", {"wrong bracket": KINDS["wrong bracket"]})
    other = make_suite(texts, tokenizer, SEQ_LEN, 1)
    assert other is not None and other.pairs["wrong bracket"] != suite.pairs["wrong bracket"]


def test_without_python_there_is_none(tokenizer):
    assert make_suite([("a.txt", "def f():\n    return 1\n")], tokenizer, SEQ_LEN, 0) is None
    assert make_suite([("a.py", "no python, this")], tokenizer, SEQ_LEN, 0) is None


def test_kinds_with_few_pairs_or_solved_by_length_are_left_out(texts, tokenizer, monkeypatch):
    few = make_suite([("a.py", "def f(x):\n    y = (x)\n    return y\n" * 3)], tokenizer, SEQ_LEN, 0)
    assert few is not None and few.pairs == {}
    assert few.left_out.keys() == KINDS.keys() and few.left_out["wrong quote"].startswith("only 0 pairs")

    def misspelt(source, unit):
        for edit in out_of_scope_name(source, unit):
            yield edit._replace(new="qzxj" * 3)

    kind = KINDS["name out of scope"]._replace(candidates=misspelt)
    monkeypatch.setattr(suite_module, "KINDS", {"misspelt": kind})
    solved = make_suite(texts, tokenizer, SEQ_LEN, 0)
    assert solved is not None
    assert solved.left_out == {"misspelt": "only 0 pairs in which length alone tells nothing"}


SCOPES = """
import os
LIMIT = 3
class A:
    shared = 1
    def first(self, alpha):
        beta = alpha + LIMIT
        print(beta)
        return os.path.join(alpha, beta)
    def second(self, gamma):
        for delta in gamma:
            print(delta)
        return self.shared
def third(omega):
    global made
    made = omega
    [psi for psi in omega]
    return omega
"""


def edits_of(candidates: Candidates, text: str, function: str) -> set[tuple[str, str]]:
    source = read_source(text)
    assert source is not None
    (unit,) = [unit for unit in source.units if unit.node.name == function]
    lines = source.lines
    return {
        (lines[edit.line][edit.start : edit.stop], edit.new)
        for edit in candidates(source, unit)
        if edited(lines[edit.line], edit)
    }


def test_names_are_out_of_scope_only_where_no_scope_around_has_them():
    found = edits_of(out_of_scope_name, SCOPES, "first")
    assert {old for old, _ in found} == {"alpha", "beta"}
    assert {new for _, new in found} <= {"gamma", "delta", "omega", "psi"} and found
    assert edits_of(out_of_scope_name, "from os import *\n" + SCOPES, "first") == set()


ATTRIBUTES = """
class Base:
    def __init__(self, box):
        self.size = box.width
class Below(Base):
    def area(self):
        self.cached = self.size * self.cached
        return self.area(box.height)
class Unknown(imported.Class):
    def area(self):
        return self.size
class Open(Base):
    def __getattr__(self, name):
        return 1
    def area(self):
        return self.size
"""


def test_attributes_are_wrong_only_where_all_of_the_class_is_known():
    source = read_source(ATTRIBUTES)
    assert source is not None
    units = [unit for unit in source.units if unit.node.name == "area"]
    found = [{edit.new for edit in wrong_attribute(source, unit)} for unit in units]
    assert found == [{"width", "height", "Class"}, set(), set()]


def test_a_far_bracket_was_opened_two_lines_above_or_more():
    text = "def f():\n    x = g(\n        1)\n    y = g(\n        1,\n        2)\n    return x\n"
    assert edits_of(far_bracket, text, "f") == {(")", "]"), (")", "}"), (")", "")}
    source = read_source(text)
    assert source is not None
    assert {edit.line for edit in far_bracket(source, source.units[0])} == {5}


def test_python_that_warns_or_does_not_parse_is_no_accident():
    assert isinstance(parsed("x = '\\d'\n"), ast.Module)
    assert parsed("x = (\n") is None and parsed("\0") is None
    assert read_source("x = 1\r\n") is None


def test_figures_stand_beside_an_untrained_model_and_what_length_alone_says(suite):
    def perfect(pairs):
        return [Likelihood(-float(n % 2), False, 1) for n in range(len(pairs))]

    def constant(pairs):
        return [Likelihood(-float(len(pair.continuation)), False, 1) for pair in pairs]

    told = score_suite(suite, perfect, constant, causal=True)
    assert told is not None and told["left_out"] == {}
    for name, figures in told["kinds"].items():
        assert figures["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}, name
        # A model that finds all tokens alike likely is the one that counts them.
        assert figures["untrained"]["value"] == pytest.approx(figures["fewer_tokens_wins"]), name
        assert figures["n"] == len(suite.pairs[name])
    assert told["all"]["n"] == sum(map(len, suite.pairs.values()))
    assert score_suite(suite, perfect, lambda pairs: None, causal=True) is None


def test_a_masked_model_is_asked_for_the_edited_line_and_the_next_given_those_before(suite, texts, tokenizer):
    asked: list[Pair] = []

    def told(pairs):
        asked.extend(pairs)
        return [Likelihood(0.0, False, 1) for _ in pairs]

    assert score_suite(suite, told, told, causal=False) is not None
    every = [pair for pairs in suite.pairs.values() for pair in pairs]
    assert len(asked) == 4 * len(every)
    for pair, good, bad in zip(every, asked[0::2], asked[1::2], strict=False):
        assert good.context == bad.context and tokenizer.decode(good.context).endswith("\n")
        assert [*good.context, *good.continuation] == pair.good and [*bad.context, *bad.continuation] == pair.bad
        assert 1 <= tokenizer.decode(good.continuation).count("\n") <= 2
    made = make_suite(texts, tokenizer, SEQ_LEN, 0, masked=True)
    assert made is not None
    assert max(len(ids) for pairs in made.pairs.values() for pair in pairs for ids in (pair.good, pair.bad)) <= SEQ_LEN


def test_the_untrained_model_is_the_one_that_training_began_with():
    with jax.set_mesh(mesh_of(fsdp=2)):
        begun = jax.jit(lambda: init_state(CFG, AdamWConfig(), 3))()
        params, balance = untrained(CFG, 3)
    # The programs differ in what else they make, and so in how they round.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, jax.device_get(params), jax.device_get(begun.params))
    assert jax.tree.leaves(balance) == []
    shardings = Counter(str(leaf.sharding.spec) for leaf in jax.tree.leaves(params))
    assert shardings == Counter(str(leaf.sharding.spec) for leaf in jax.tree.leaves(begun.params))
