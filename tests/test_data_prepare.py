"""Prepared data is whole, the same every time, and never half there, whatever happens on the way."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llm_jax import exit_codes
from llm_jax.config import ConfigError, to_json
from llm_jax.data import stages, store
from llm_jax.data.config import BOS_ID, PAD_ID, DataConfig, TokenizerConfig
from llm_jax.data.errors import DataError
from llm_jax.data.loader import open_rows
from llm_jax.data.packing import row_dtype
from llm_jax.data.prepare import Prepared, documents, is_prepared, open_prepared, prepare
from llm_jax.data.splits import SPLITS
from tests import data_texts
from tests.conftest import Start
from tests.data_texts import BPE, VOCAB


def quietly(data: DataConfig, tokenizer: TokenizerConfig = BPE, vocab: int = VOCAB, seed: int = 0) -> Prepared:
    return prepare(data, tokenizer, vocab, seed, report=lambda line: None)


def reports(data: DataConfig, tokenizer: TokenizerConfig = BPE, vocab: int = VOCAB, seed: int = 0) -> list[str]:
    """The stages that a preparation goes through."""
    lines: list[str] = []
    prepare(data, tokenizer, vocab, seed, report=lines.append)
    return [line.split()[0] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_texts.write_files(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return quietly(data_texts.config(folder, into=tmp_path_factory.mktemp("data")))


def stored_rows(prepared: Prepared, split: str) -> np.ndarray:
    """int32 [N, U]"""
    rows = open_rows(prepared, split)
    return rows[np.arange(len(rows))]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_the_documents_and_nothing_else(prepared: Prepared, split: str) -> None:
    rows_NU = stored_rows(prepared, split)
    np.testing.assert_array_equal(rows_NU[:-1, -1], rows_NU[1:, 0])
    tokens = np.concatenate([rows_NU[0, :1], rows_NU[:, 1:].reshape(-1)])
    n_padding = int((tokens == PAD_ID).sum())
    assert (tokens[len(tokens) - n_padding :] == PAD_ID).all() and n_padding < prepared.seq_len
    tokens = tokens[: len(tokens) - n_padding]
    assert len(tokens) == prepared.rows_info["splits"][split]["tokens"]
    parts = np.split(tokens, np.flatnonzero(tokens == BOS_ID))
    assert not len(parts[0])
    texts = [prepared.tokenizer.decode(part.tolist()) for part in parts[1:]]
    assert texts == [text for _, text in documents(prepared, split)]
    assert prepared.tokenizer.piece_bytes[tokens].sum() == prepared.text_info["splits"][split]["bytes"]


def test_every_file_is_in_one_split(prepared: Prepared, folder: Path) -> None:
    stored = [pair for split in SPLITS for pair in documents(prepared, split)]
    assert sorted(stored) == [(path.name, path.read_text()) for path in sorted(folder.iterdir())]
    assert all(prepared.text_info["splits"][split]["documents"] for split in SPLITS)


def test_preparing_again_is_only_looking(prepared: Prepared, folder: Path) -> None:
    data = data_texts.config(folder, into=prepared.text.parents[1])
    assert is_prepared(data, BPE, VOCAB, 0)
    assert reports(data) == []
    assert open_prepared(data, BPE, VOCAB, 0).fingerprint == prepared.fingerprint


def test_what_was_made_is_the_same_elsewhere(prepared: Prepared, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    other = quietly(data_texts.config(copied, into=tmp_path / "data"))
    assert other.text != prepared.text
    assert other.fingerprint == prepared.fingerprint
    for split in SPLITS:
        np.testing.assert_array_equal(stored_rows(other, split), stored_rows(prepared, split))
    (copied / "text007.txt").write_text("something else\n")
    assert quietly(data_texts.config(copied, into=tmp_path / "data")).fingerprint != prepared.fingerprint


def test_only_what_differs_is_made_again(prepared: Prepared, folder: Path) -> None:
    data = data_texts.config(folder, into=prepared.text.parents[1])
    assert reports(data.model_copy(update={"seq_len": 16})) == ["rows"]
    assert reports(data, vocab=VOCAB + 1) == ["tokenizer", "rows"]
    assert reports(data, seed=1) == [], "a seed makes no difference where no text is drawn"
    assert reports(data, TokenizerConfig(train_bytes=20_000), seed=1) == ["tokenizer", "rows"]
    assert reports(data, TokenizerConfig(train_bytes=20_000), seed=2) == ["tokenizer", "rows"]
    assert reports(data.model_copy(update={"test_share": 0.2})) == ["text", "tokenizer", "rows"]
    assert reports(data.model_copy(update={"prefetch": 7, "cross_documents": True})) == []


def test_text_for_the_tokenizer_is_drawn_by_the_seed(folder: Path, tmp_path: Path) -> None:
    sampled = TokenizerConfig(train_bytes=20_000)
    fingerprints = [
        quietly(data_texts.config(folder, into=tmp_path / place), sampled, seed=seed).tokenizer.fingerprint
        for place, seed in (("a", 0), ("b", 0), ("b", 1))
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_source_that_is_gone_is_not_missed(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    data = data_texts.config(copied, into=tmp_path / "data")
    made = quietly(data)
    shutil.rmtree(copied)
    assert is_prepared(data, BPE, VOCAB, 0)
    assert quietly(data).fingerprint == open_prepared(data, BPE, VOCAB, 0).fingerprint == made.fingerprint
    with pytest.raises(DataError, match="no such file"):
        quietly(data, vocab=VOCAB + 1)


def test_a_changed_source_is_prepared_anew_and_readers_still_find_the_old(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    data = data_texts.config(copied, into=tmp_path / "data")
    made = quietly(data)
    (copied / "new.txt").write_text("new\n")
    assert not is_prepared(data, BPE, VOCAB, 0)
    assert open_prepared(data, BPE, VOCAB, 0).fingerprint == made.fingerprint
    assert quietly(data).fingerprint != made.fingerprint


def test_readers_are_told_what_to_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing prepared for this config in .*; run: llm-jax data prepare"):
        open_prepared(data_texts.config(folder, into=tmp_path), BPE, VOCAB, 0)
    assert not list(tmp_path.iterdir()), "a reader must not write"


def test_an_impossible_vocabulary_names_both_sizes_and_keeps_the_text(folder: Path, tmp_path: Path) -> None:
    data = data_texts.config(folder, into=tmp_path)
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size = 60000, but the corpus yields only \d+ pieces; set model"
    ):
        quietly(data, vocab=60_000)
    assert reports(data) == ["tokenizer", "rows"]


@pytest.mark.parametrize("damage", ["truncated", "removed", "info"])
@pytest.mark.parametrize("stage", ["text", "tokenizer-*", "rows-*"])
def test_damage_is_noticed(stage: str, damage: str, prepared: Prepared, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / prepared.text.parent.name
    shutil.copytree(prepared.text.parent, root)
    for path in root.glob("rows-*"):
        if path.name != prepared.rows.name:
            shutil.rmtree(path)
    data = data_texts.config(folder, into=tmp_path)
    stage_folder = root / f"{stage}" if stage == "text" else next(p for p in root.glob(stage) if "400-whole" in p.name)
    victim = (
        stage_folder / "info.json"
        if damage == "info"
        else max((p for p in stage_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    )
    if damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    for attempt in (quietly, lambda data: open_prepared(data, BPE, VOCAB, 0)):
        with pytest.raises(DataError, match=f"delete {stage_folder} and prepare again"):
            attempt(data)


def test_tiny_and_odd_texts_work(tmp_path: Path) -> None:
    """One line of a megabyte, CRLF, NUL, spelled control tokens, a literal U+2581, nothing but spaces, one letter."""
    odd = {
        "line.txt": data_texts.sentences(1, 20_000).replace("\n", " "),
        "crlf.txt": "a\r\nb\r\n" * 50,
        "nul.txt": "a\0b\n" * 50,
        "special.txt": "<bos><pad><mask></s><s>\n" * 50,
        "space.txt": "▁ ▁▁\n" * 50,
        "blank.txt": " \n" * 50,
        "letter.txt": "x",
    }
    for name, text in odd.items():
        (tmp_path / name).write_bytes(text.encode())
    made = quietly(data_texts.config(tmp_path, into=tmp_path / "data"))
    assert made.text_info["cut"], "one large document cannot be held out whole"
    assert made.text_info["with_nul"] == 1
    found = dict.fromkeys(odd, "")
    for split in SPLITS:
        for name, text in documents(made, split):
            found[name] += text
        rows_NU = stored_rows(made, split)
        assert rows_NU.max() < VOCAB
        n_documents = made.text_info["splits"][split]["documents"]
        starts = (rows_NU[:, 1:] == BOS_ID).sum() + (rows_NU[0, 0] == BOS_ID)
        assert starts == n_documents, "only documents begin with BOS, whatever text spells"
        assert made.tokenizer.piece_bytes[rows_NU[:, 1:]].sum() == made.text_info["splits"][split]["bytes"]
    assert found == odd


def test_one_word_is_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "word.txt").write_text("hello")
    made = quietly(data_texts.config(tmp_path, into=tmp_path / "data"), vocab=270)
    assert made.tokenizer.decode(stored_rows(made, "train")[0].tolist()) == "hell"
    assert made.rows_info["splits"]["train"]["rows"] == 1
    with pytest.raises(DataError, match=r"the test split has no rows; raise data\.test_share, or give more text"):
        open_rows(made, "test")


def test_a_large_vocabulary_is_stored_in_more_bytes() -> None:
    assert row_dtype(65_536) == np.uint16
    assert row_dtype(65_537) == np.int32


def test_text_and_rows_in_several_shards_are_the_same(
    prepared: Prepared, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 10_000)
    monkeypatch.setattr("llm_jax.data.packing.ENCODE_TOGETHER", 5_000)
    other = quietly(data_texts.config(folder, into=tmp_path))
    for stage, dataset in ((other.text, stages.DOCUMENTS), (other.rows, stages.ROWS)):
        splits = tfds.builder_from_directory(builder_dir=stage / dataset / "1.0.0").info.splits
        lengths = splits["train"].shard_lengths
        assert len(lengths) > 3
        assert max(lengths) < 3 * min(lengths)
    assert other.fingerprint == prepared.fingerprint
    rows = open_rows(other, "train", 3)
    np.testing.assert_array_equal(rows[np.arange(50)], open_rows(prepared, "train", 3)[np.arange(50)])


@pytest.mark.slow
def test_the_standard_library_end_to_end(tmp_path: Path) -> None:
    data = DataConfig(dir=str(tmp_path))
    made = quietly(data, vocab=2048)
    info = made.text_info
    total = sum(split["bytes"] for split in info["splits"].values())
    for split in ("validation", "test"):
        assert 0.04 < info["splits"][split]["bytes"] / total < 0.06
    modules = [{key.split("/")[0].removesuffix(".py") for key, _ in documents(made, split)} for split in SPLITS]
    assert not modules[0] & modules[1] and not modules[0] & modules[2] and not modules[1] & modules[2]
    assert info["leaked_share"] < 0.1
    test_ids = made.tokenizer.encode_many([text for _, text in documents(made, "test")])
    assert sum(made.tokenizer.piece_bytes[ids].sum() for ids in test_ids) == info["splits"]["test"]["bytes"]


SCRIPT = """
import resource, signal, sys
from llm_jax.config import from_json
from llm_jax.data import prepare, stages, store, tokenizer
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.exit_codes import Failure

def die(*_):
    import os
    os.kill(os.getpid(), signal.SIGKILL)

{fault}
data = from_json(DataConfig, sys.argv[1])
try:
    made = prepare.prepare(data, TokenizerConfig(), {vocab}, 0)
except Failure as failure:
    print(failure)
    sys.exit(failure.exit_code)
print(made.fingerprint)
"""

# Each kills the process at another place; COUNT documents are written before rows are.
KILLS = {
    "reading": "stages.make_plan = die",
    "writing text": """
left = 20
def count(meter, n, add=store.Meter.add):
    global left
    left -= 1
    if not left: die()
    add(meter, n)
store.Meter.add = count""",
    "text written": "store.write_info = die",
    "text almost there": "store.os.rename = die",
    "training": "stages.tokenizer.train = die",
    "tokenizer almost there": """
def then_die(*a, train=tokenizer.train):
    store.os.rename = die
    return train(*a)
stages.tokenizer.train = then_die""",
    "writing rows": """
def some(*a, rows=stages.packing.rows):
    for n, row in enumerate(rows(*a)):
        if n == 40: die()
        yield row
stages.packing.rows = some""",
    "rows almost there": "stages._row_contents = die",
}


def is_whole(root: Path, stage: str) -> bool:
    return any((path / "info.json").exists() for path in root.glob(f"*/{stage}") if path.suffix != store.PARTIAL)


# One of each stage's work every day.
OFTEN = ("writing text", "tokenizer almost there", "writing rows")


@pytest.mark.parametrize(
    "kill", [pytest.param(kill, marks=[] if kill in OFTEN else pytest.mark.slow) for kill in KILLS]
)
def test_a_killed_preparation_goes_on(
    kill: str, prepared: Prepared, folder: Path, tmp_path: Path, start: Start
) -> None:
    data = data_texts.config(folder, into=tmp_path / "data")
    done = start("-c", SCRIPT.format(fault=KILLS[kill], vocab=VOCAB), to_json(data)).wait()
    assert done.returncode == -9, done.stderr
    assert not is_prepared(data, BPE, VOCAB, 0)
    finished = [stage for stage in ("text", "tokenizer-*", "rows-*") if is_whole(tmp_path / "data", stage)]
    lines: list[str] = []
    again = prepare(data, BPE, VOCAB, 0, report=lines.append)
    assert [line.split()[0] for line in lines] == ["text", "tokenizer", "rows"][len(finished) :]
    assert again.fingerprint == prepared.fingerprint
    assert not list((tmp_path / "data").rglob(f"*{store.PARTIAL}*"))


# A file may not grow beyond so many bytes: what writing on a full disk looks like, without being root.
FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full(*a, stage=stages.{stage}):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return stage(*a)
stages.{stage} = full
"""


@pytest.mark.parametrize("limit", [pytest.param(1000, marks=pytest.mark.slow), 5000])
@pytest.mark.parametrize(("stage", "finished"), [("write_text", 0), ("write_tokenizer", 1), ("write_rows", 2)])
def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    stage: str, finished: int, limit: int, prepared: Prepared, folder: Path, tmp_path: Path, start: Start
) -> None:
    data = data_texts.config(folder, into=tmp_path / "data")
    script = SCRIPT.format(fault=FULL.format(stage=stage, limit=limit), vocab=VOCAB)
    done = start("-c", script, to_json(data)).wait()
    assert done.returncode == exit_codes.CHECKPOINT, done.stderr
    told = done.stdout.splitlines()[-1]
    assert told.startswith("cannot write ") and told.endswith(
        "File too large; make room there or set data.dir to another disk"
    )
    assert "Traceback" not in done.stderr
    stages_there = [p for p in (tmp_path / "data").glob("*/*") if p.is_dir()]
    assert len(stages_there) == finished and all((p / "info.json").exists() for p in stages_there)
    assert quietly(data).fingerprint == prepared.fingerprint


def test_an_unwritable_place_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(exit_codes.Failure) as caught:
        quietly(data_texts.config(folder, into=tmp_path / "file" / "data"))
    assert caught.value.exit_code == exit_codes.CHECKPOINT
    assert "Not a directory" in str(caught.value)


def test_two_processes_that_want_the_same_make_it_once(
    prepared: Prepared, folder: Path, tmp_path: Path, start: Start
) -> None:
    data = to_json(data_texts.config(folder, into=tmp_path / "data"))
    # Slow enough for both to meet.
    slow = "import time\nstages.make_plan = lambda *a, plan=stages.make_plan: (time.sleep(3), plan(*a))[1]"
    both = [start("-c", SCRIPT.format(fault=slow, vocab=VOCAB), data) for _ in range(2)]
    outputs = [running.wait().stdout.splitlines() for running in both]
    assert [lines[-1] for lines in outputs] == [prepared.fingerprint] * 2
    told = [line.split()[0] for lines in outputs for line in lines[:-1]]
    assert sorted(told) == ["rows", "text", "tokenizer", "waiting:"]


def test_info_says_what_happened(prepared: Prepared, folder: Path) -> None:
    info = json.loads((prepared.text / "info.json").read_text())
    assert info["source"]["paths"] == [str(folder)]
    assert info["skipped"] == {} and info["cut"] is False and info["with_nul"] == 0
    assert 0 <= info["leaked_share"] < 0.1
    assert stages.text_summary(info).startswith("40 documents (train ")
    assert stages.rows_summary(prepared.rows_info, 32).endswith(")")
