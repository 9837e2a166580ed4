"""`llm-jax inspect`: one page that needs nothing else, true to what was seen, whatever the text holds."""

import base64
import contextlib
import hashlib
import re
import struct
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llm_jax import manifest
from llm_jax.checkpoint import Checkpoints
from llm_jax.config import ConfigError, tree
from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.inspection import cli as inspection
from llm_jax.inspection.look import PageError, inspect_checkpoint, most_tokens
from llm_jax.inspection.page import label
from llm_jax.inspection.png import png, shades
from llm_jax.model.config import LayerConfig, ModelConfig, MoeConfig
from llm_jax.model.paths import to_tree
from llm_jax.objective.config import CausalConfig, MlmConfig
from llm_jax.optim.config import AdamWConfig
from llm_jax.run import Run
from llm_jax.train.state import init_state
from tests.conftest import LaunchProcesses, Start
from tests.small import mesh_of

MODEL = ModelConfig(
    d_model=16,
    d_ff=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    d_head=4,
    vocab_size=300,
    period=(LayerConfig(window=8), LayerConfig(moe=True)),
    moe=MoeConfig(experts=4, top_k=2, d_ff=16),
)
EVIL = "</script></div>\n<script>alert(1)</script><img src=http://x/ onerror='a'>&amp;\"\u6f22 the cat"


class Made(NamedTuple):
    """Run directories of a causal and of a masked model, as training leaves them, without their data."""

    causal: Path
    masked: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    tokenizer = tokenizers.train(["the cat sat on the mat.\nthe dog ran to the cat.\n" * 30], TokenizerConfig(), 300)
    made = Made(root / "causal", root / "masked", tokenizer)
    with jax.set_mesh(mesh_of(fsdp=8)):
        arrays = jax.jit(lambda: to_tree(init_state(MODEL, AdamWConfig(), 0)))()
        for run_dir, objective in ((made.causal, CausalConfig()), (made.masked, MlmConfig())):
            data = DataConfig(seq_len=96)
            run = Run(name="<b>seen", run_dir=str(run_dir), model=MODEL, data=data, objective=objective)
            meta = {"format": 1, "run": tree(run), "tokenizer": tokenizer.fingerprint, "data": "0", "versions": {}}
            with contextlib.closing(Checkpoints(run_dir / "checkpoints", keep=9)) as checkpoints:
                checkpoints.save(7, arrays, meta, wait=True)
            (run_dir / "tokenizer.model").write_bytes(tokenizer.model)
    return made


class Page(HTMLParser):
    """What a browser would be told to fetch, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.spans: list[str] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._open = tag == "span" and attributes.get("class") == "token" and "title" in attributes
        if self._open:
            self.spans.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.spans[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]


def inspect(run_dir: Path, text: str, out: Path, *overrides: str) -> str:
    inspect_checkpoint(str(run_dir), None, overrides, text, out)
    return out.read_text(encoding="utf-8")


def test_the_page_holds_the_text_and_nothing_that_it_would_have_to_fetch(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[Path] = []
    findings = manifest.findings

    def counted(folder: Path, listed: manifest.Manifest, index: int, count: int) -> list[str]:
        readings.append(folder)
        return findings(folder, listed, index, count)

    monkeypatch.setattr(manifest, "findings", counted)
    text = inspect(made.causal, EVIL, tmp_path / "new" / "page.html", "mesh.data=1")
    assert len(readings) == 1, "a checkpoint's files are read for their digests once"
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'page.html'}\n"
    page, ids = Page(text), made.tokenizer.encode(EVIL).tolist()
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img") if image["src"])
    assert len(page.all("img")) == 1 + MODEL.n_layers * MODEL.n_heads
    assert not any(name in attributes for _, attributes in page.tags for name in ("href", "onerror", "onclick"))
    scripts = [attributes for attributes in page.all("script") if "type" not in attributes]
    assert scripts == [{}], "the page's own script, and the text's are text"
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    own = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    shown = "".join(page.spans).replace("\u21b5\n", "\n")
    assert len(page.spans) == len(ids) and shown == EVIL.replace("\u6f22", "<E6><BC><A2>")
    titles = [attributes["title"] for attributes in page.all("span") if "rank" in (attributes.get("title") or "")]
    assert len(titles) == len(ids)
    assert all(
        re.search(r"\n\d+\.\d{3} nats, rank \d+\nguesses: (.+ \d+\.\d%(, )?){5}$", title or "") for title in titles
    )
    for told in ("the last 8", "all before", "Logit lens", "layer 1: ", "2 of 4 experts", "After 7 steps"):
        assert told in text, told


def test_a_masked_models_page_says_how_its_losses_came_about(made: Made, tmp_path: Path) -> None:
    text = inspect(made.masked, "the cat sat", tmp_path / "page.html", "mesh.data=1", "mesh.tensor=2", "mesh.context=2")
    assert "each of them hidden alone" in text and "bits per byte" not in text
    assert "4 to either side" in text and "then comes" not in text and "the token itself" in text


def test_a_text_longer_than_a_page_is_cut_which_is_said(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = inspect(made.causal, "cat\n" * 10_000, tmp_path / "page.html", "mesh.data=1")
    assert "the text is longer than a page; its first 95 tokens are shown\n" in capsys.readouterr().err
    assert "The text is longer; its first 95 tokens are shown." in text and len(Page(text).spans) == 95


def test_a_page_is_bounded() -> None:
    assert most_tokens(MODEL, 64) == 64 and most_tokens(MODEL, 100_000) == 256
    assert most_tokens(MODEL.model_copy(update={"learned_positions": 40}), 64) == 40
    large = MODEL.model_copy(update={"n_layers": 80, "n_heads": 64})
    assert most_tokens(large, 8192) == 57


def test_a_picture_holds_its_shares() -> None:
    shares_TS = np.random.default_rng(0).random((5, 7)).astype(np.float32) ** 3
    shares_TS[0] = 0, 1, 0, 0, 1, 0, 0
    raw = png(shades(shares_TS), (1, 2, 3))
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(raw):
        (size,) = struct.unpack(">I", raw[at : at + 4])
        kind, body = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (7, 5, 8, 3, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 8)
    assert not lines[:, 0].any() and chunks[b"tRNS"] == bytes(range(256)) and chunks[b"PLTE"] == b"\1\2\3" * 256
    np.testing.assert_allclose((lines[:, 1:] / 255) ** 2, shares_TS, atol=1 / 255)
    assert lines[0, 1:].tolist() == [0, 255, 0, 0, 255, 0, 0]


def test_labels_show_every_character(made: Made) -> None:
    def labels(text: str) -> list[str]:
        return [label(made.tokenizer, i) for i in made.tokenizer.encode(text).tolist()]

    assert "".join(labels("a\n\n")) == "a\u21b5\u21b5" and labels("\u00e9")[:1] == ["<C3>"]
    assert "".join(labels("the cat")) == "the\u00b7cat"
    assert [label(made.tokenizer, i) for i in (0, 2, 4)] == ["<pad>", "<bos>", "<mask>"]


def test_a_page_that_cannot_be_written_is_told(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PageError, match=r"file\S* cannot be written: (Not a directory|File exists)$") as caught:
        inspect_checkpoint(str(made.causal), None, ("mesh.data=1",), EVIL, tmp_path / "file" / "page.html")
    assert caught.value.exit_code == 74


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "--text and --file: give one of the two"),
        (("--text", "a", "--file", "b"), "--text and --file: give one of the two"),
        (("--text", ""), "--text: is empty"),
        (("--text", " \n\t"), "--text: has nothing but blanks"),
        (("--text", "a\udcff"), r"--text 'a\udcff': is not UTF-8"),
        (("--file", "nowhere.txt"), "--file nowhere.txt: No such file or directory"),
        (("--file", "bytes.txt"), "--file bytes.txt: is not UTF-8 at byte 2"),
        (("--file", "blank.txt"), "--file blank.txt: has nothing but blanks"),
        (("--file", "empty.txt"), "--file empty.txt: is empty"),
        (("--txt", "a"), "llm-jax inspect: --txt: no such option; did you mean --text?"),
    ],
)
def test_mistakes_in_one_line(
    arguments: Sequence[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("bytes.txt", b"ab\xff"), ("blank.txt", b"\n \n"), ("empty.txt", b"")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        inspection.main(["runs/none", *arguments])
    assert str(caught.value) == line


def test_there_has_to_be_such_a_run() -> None:
    with pytest.raises(ConfigError, match=r"^runs/none: no such run directory$"):
        inspect_checkpoint("runs/none", None, (), "the", None)


@pytest.mark.slow
def test_as_processes_the_default_page_and_several_agree(
    made: Made, start: Start, launch_processes: LaunchProcesses, tmp_path: Path
) -> None:
    arguments = ["-m", "llm_jax", "inspect", str(made.causal), "--text", "the cat sat"]
    alone = start(*arguments, devices=1).wait()
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == f"{made.causal / 'inspect.html'}\n"
    first, second = launch_processes(2, 4, [*arguments, "--out", "page.html", "mesh.tensor=4"])
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "page.html" in first.stdout and "page.html" not in second.stdout

    def figures(page: Path) -> list[float]:
        return [float(nats) for nats in re.findall(r"(\d+\.\d{3}) nats, rank", page.read_text())]

    ours, theirs = figures(made.causal / "inspect.html"), figures(tmp_path / "page.html")
    assert len(ours) == len(made.tokenizer.encode("the cat sat"))
    assert theirs == pytest.approx(ours, abs=2e-3)
