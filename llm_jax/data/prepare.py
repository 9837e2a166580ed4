"""Prepared data on disk: where it is, whether it is there, and making it. A finished stage is never made again.

<data.dir>/<name>-<config>-<source>/text/                      documents in three splits
                                    tokenizer-<...>/           tokenizer.model
                                    rows-<T>-<tokenizer>/      token rows in three splits
"""

import fcntl
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llm_jax.data import stages, store
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.data.corpus import Corpus, open_corpus
from llm_jax.data.errors import DataError, disk_errors
from llm_jax.data.tokenizer import Tokenizer

# Part of every folder's name: raised when the same text would become something else.
FORMAT = 1

# How often whoever waits for another process's preparation looks.
POLL_S = 0.5

Report = Callable[[str], None]


class Stopped(Exception):
    """Preparing was stopped between two stages; what is finished stays."""


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset: the folders of its stages, and what their info.json say."""

    text: Path
    rows: Path
    tokenizer: Tokenizer
    seq_len: int
    text_info: dict[str, Any]
    """source, python, splits (documents, bytes), skipped, named_skips, with_nul, cut, leaked_share, fingerprint."""
    rows_info: dict[str, Any]
    """splits (rows, tokens), dtype, fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Of everything decoded: the text, the tokenizer, the rows."""
        return _key(self.text_info["fingerprint"], self.tokenizer.fingerprint, self.rows_info["fingerprint"])


@dataclass(frozen=True)
class Wanted:
    """What is to be prepared; each stage's folder follows from what makes it."""

    data: DataConfig
    tokenizer: TokenizerConfig
    vocab_size: int
    seed: int

    def config_key(self) -> str:
        """Of everything that decides the text but the source's contents."""
        data = self.data
        return _key(FORMAT, data.source.model_dump(mode="json"), data.validation_share, data.test_share)[:8]

    def root(self, corpus: Corpus) -> Path:
        """The folder of all that is made from this text."""
        name = re.sub(r"[^\w.]+", "_", corpus.name)[:40]
        return Path(self.data.dir) / f"{name}-{self.config_key()}-{_key(corpus.version)[:8]}"

    def tokenizer_folder(self, root: Path) -> Path:
        """Where all text is shown to the trainer, neither the seed nor the limit makes a difference."""
        sampled = stages.is_sampled(self.tokenizer, store.read_info(root / "text"))
        sample = _key(self.seed, self.tokenizer.train_bytes)[:8] if sampled else "whole"
        return root / f"tokenizer-{self.tokenizer.kind}-{self.vocab_size}-{sample}"

    def rows_folder(self, root: Path) -> Path:
        """Rows belong to a tokenizer."""
        return root / f"rows-{self.data.seq_len}-{self.tokenizer_folder(root).name.removeprefix('tokenizer-')}"


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    vocab_size: int,
    seed: int,
    report: Report = print,
    stop: Callable[[], bool] = lambda: False,
) -> Prepared:
    """Makes what is not there yet; of several processes that want the same, one makes it and the others wait.

    report gets a line for each stage. stop is asked before each stage, and while another process is waited for.

    Raises Stopped where stop said so, DataError, DiskError, or ConfigError for a vocab_size the text forbids.
    """
    wanted = Wanted(data, tokenizer, vocab_size, seed)
    if (root := _find(wanted)) and _is_complete(wanted, root):
        return _open(wanted, root)
    corpus = open_corpus(data.source)
    root = wanted.root(corpus)
    text = root / "text"
    with _lock(root, report, stop):
        if not store.is_complete(text):
            with _stage("text", report, stop) as said:
                said.append(stages.write_text(text, corpus, data))
        text_info = store.read_info(text)
        model = wanted.tokenizer_folder(root)
        if not store.is_complete(model):
            with _stage("tokenizer", report, stop) as said:
                said.append(stages.write_tokenizer(model, text, text_info, tokenizer, vocab_size, seed))
        rows = wanted.rows_folder(root)
        if not store.is_complete(rows):
            with _stage("rows", report, stop) as said:
                said.append(stages.write_rows(rows, text, text_info, stages.load_tokenizer(model), data.seq_len))
    return _open(wanted, root)


def is_prepared(data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, seed: int) -> bool:
    """Whether prepare would have nothing to do. Raises DataError where what it made is damaged."""
    wanted = Wanted(data, tokenizer, vocab_size, seed)
    root = _find(wanted)
    return root is not None and _is_complete(wanted, root)


def open_prepared(data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, seed: int) -> Prepared:
    """For readers: never writes. Raises DataError where it has not been prepared.

    Where nothing was made from the source as it is now, or the source is gone, it opens the newest that was made by
    the same config: what it holds is told by its fingerprint.
    """
    wanted = Wanted(data, tokenizer, vocab_size, seed)
    for root in (_find(wanted), _find_older(wanted)):
        if root is not None and _is_complete(wanted, root):
            return _open(wanted, root)
    raise DataError(f"nothing prepared for this config in {data.dir}; run: llm-jax data prepare CONFIG")


def documents(prepared: Prepared, split: str) -> Iterator[tuple[str, str]]:
    """(key, exact text) of a split's documents, in stored order."""
    for example in store.read_split(prepared.text, stages.DOCUMENTS, split):
        yield example["key"].decode(), example["text"].decode()


def _find(wanted: Wanted) -> Path | None:
    """The folder for the source as it is now; where the source is gone, the newest one by the same config."""
    try:
        return wanted.root(open_corpus(wanted.data.source))
    except DataError:
        return _find_older(wanted)


def _find_older(wanted: Wanted) -> Path | None:
    made = Path(wanted.data.dir).glob(f"*-{wanted.config_key()}-????????/text/{store.INFO}")
    newest = max(made, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.parent if newest else None


def _is_complete(wanted: Wanted, root: Path) -> bool:
    return (
        store.is_complete(root / "text")
        and store.is_complete(wanted.tokenizer_folder(root))
        and store.is_complete(wanted.rows_folder(root))
    )


def _open(wanted: Wanted, root: Path) -> Prepared:
    text, rows = root / "text", wanted.rows_folder(root)
    encoder = stages.load_tokenizer(wanted.tokenizer_folder(root))
    return Prepared(text, rows, encoder, wanted.data.seq_len, store.read_info(text), store.read_info(rows))


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _lock(root: Path, report: Report, stop: Callable[[], bool]) -> Iterator[None]:
    """Held by one process at a time; the operating system frees it when the process dies."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "w")
    with lock:
        if not _locks(lock):
            report(f"waiting: another process prepares {root}")
            while not _locks(lock):
                if stop():
                    raise Stopped
                time.sleep(POLL_S)
        store.clean(root)
        yield


def _locks(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _stage(stage: str, report: Report, stop: Callable[[], bool]) -> Iterator[list[str]]:
    """Reports what the block appends, with the seconds it took. Raises Stopped before it begins."""
    if stop():
        raise Stopped
    begin = time.monotonic()
    said: list[str] = []
    yield said
    report(f"{stage} [{time.monotonic() - begin:.1f} s]: {' '.join(said)}")
