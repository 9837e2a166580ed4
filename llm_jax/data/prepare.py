"""Text, tokenizer and rows on disk, each made once: a stage that is there is used, so what was killed goes on.

<data.dir>/<name>-<config>-<source>/text/                      documents in three splits
                                    tokenizer-<...>/           tokenizer.model
                                    rows-<T>-<tokenizer>/      token rows in three splits
"""

import fcntl
import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jax.data import packing, store
from llm_jax.data import tokenizer as tokenizer_module
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.data.corpus import Corpus, open_corpus
from llm_jax.data.errors import DataError, disk_errors
from llm_jax.data.progress import progress
from llm_jax.data.splits import SPLITS, Plan, documents_of, leaked_share, make_plan
from llm_jax.data.tokenizer import Tokenizer

# Part of every key: another way of making the same thing from the same text.
FORMAT = 1

Report = Callable[[str], None]


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


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, seed: int, report: Report = print
) -> Prepared:
    """Makes what is not there yet; of several processes that want the same, one makes it and the others wait.

    report gets a line for each stage. Raises DataError, DiskError, or ConfigError for a vocab_size the text forbids.
    """
    if is_prepared(data, tokenizer, vocab_size, seed):
        return open_prepared(data, tokenizer, vocab_size, seed)
    corpus = open_corpus(data.source)
    root = _root(data, corpus)
    with _lock(root, report):
        text = root / "text"
        if not store.is_complete(text):
            with _timed(report, "text") as lines:
                lines.append(_write_text(text, corpus, data))
        text_info = store.read_info(text)
        model = root / _tokenizer_name(tokenizer, vocab_size, seed, text_info)
        if not store.is_complete(model):
            with _timed(report, "tokenizer") as lines:
                lines.append(_write_tokenizer(model, text, text_info, tokenizer, vocab_size, seed))
        rows = _rows_folder(model, data.seq_len)
        if not store.is_complete(rows):
            with _timed(report, "rows") as lines:
                lines.append(_write_rows(rows, text, text_info, _load_tokenizer(model), data.seq_len))
    return _open(text, model, rows, data.seq_len)


def is_prepared(data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, seed: int) -> bool:
    """Whether prepare would have nothing to do. Raises DataError where what it made is damaged."""
    root = _find_root(data)
    if root is None or not store.is_complete(root / "text"):
        return False
    model = root / _tokenizer_name(tokenizer, vocab_size, seed, store.read_info(root / "text"))
    return store.is_complete(model) and store.is_complete(_rows_folder(model, data.seq_len))


def open_prepared(data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, seed: int) -> Prepared:
    """For readers: never writes. Raises DataError where it has not been prepared."""
    if not is_prepared(data, tokenizer, vocab_size, seed):
        raise DataError(f"nothing prepared for this config below {data.dir}; run: llm-jax data prepare CONFIG")
    root = _find_root(data)
    assert root is not None
    model = root / _tokenizer_name(tokenizer, vocab_size, seed, store.read_info(root / "text"))
    return _open(root / "text", model, _rows_folder(model, data.seq_len), data.seq_len)


def documents(prepared: Prepared, split: str) -> Iterator[tuple[str, str]]:
    """(key, exact text) of a split's documents, in stored order."""
    for example in store.read_split(prepared.text, "documents", split):
        yield example["key"].decode(), example["text"].decode()


def _open(text: Path, model: Path, rows: Path, seq_len: int) -> Prepared:
    return Prepared(text, rows, _load_tokenizer(model), seq_len, store.read_info(text), store.read_info(rows))


def _write_text(folder: Path, corpus: Corpus, data: DataConfig) -> str:
    """Returns what to report."""
    with progress("reading", corpus.size) as advance:
        plan = make_plan(corpus.read(), data, advance)
    with store.stage(folder) as partial:
        with progress("writing text", corpus.size) as advance:
            store.build(store.Documents(_text_splits(corpus, plan, advance), data_dir=partial))
        splits = {}
        digest = store.Digest()
        for split in SPLITS:
            n_documents, n_bytes = 0, 0
            digest.add(split.encode())
            for example in store.read_split(partial, "documents", split):
                digest.add(example["key"])
                digest.add(example["text"])
                n_documents, n_bytes = n_documents + 1, n_bytes + len(example["text"])
            splits[split] = {"documents": n_documents, "bytes": n_bytes}
        if sum(split["bytes"] for split in splits.values()) != plan.bytes_N[plan.bytes_N > 0].sum():
            raise DataError(f"{folder}: what was written cannot be read back; is the disk damaged?")
        info = {
            "source": data.source.model_dump(mode="json"),
            "python": platform.python_version(),
            "splits": splits,
            "skipped": plan.skipped,
            "named_skips": plan.named_skips,
            "with_nul": plan.with_nul,
            "cut": plan.cut is not None,
            "leaked_share": leaked_share(_texts(partial, "train"), _texts(partial, "test")),
            "fingerprint": digest.hex(),
        }
        store.write_info(partial, info)
    return "\n  left out: ".join([text_summary(info), *plan.named_skips])


def _text_splits(corpus: Corpus, plan: Plan, advance: Callable[[int], None]) -> dict[str, store.Shards]:
    """The shards of each split that has text."""

    def examples(split: str, n_bytes: int) -> store.Shards:
        written = 0

        def stream() -> Iterator[store.Example]:
            nonlocal written
            for document in documents_of(split, corpus.read(), plan):
                size = len(document.text.encode())
                written += size
                advance(size)
                yield {"key": document.key, "text": document.text}

        return store.shards(stream(), n_bytes, lambda: written / n_bytes)

    return {split: examples(split, size) for split, size in plan.split_sizes().items() if size}


def _write_tokenizer(
    folder: Path, text: Path, text_info: dict[str, Any], config: TokenizerConfig, vocab_size: int, seed: int
) -> str:
    """Trains on the training split, or on documents of it drawn by the seed; returns what to report."""
    order = None
    if _is_sampled(config, text_info):
        n_documents = text_info["splits"]["train"]["documents"]
        # Not numpy's generators: what they give may change from version to version.
        order = sorted(range(n_documents), key=lambda i: hashlib.md5(f"{seed}:{i}".encode()).digest())
    texts = (example["text"].decode() for example in store.read_split(text, "documents", "train", order))
    tokenizer = tokenizer_module.train(texts, config, vocab_size)
    with store.stage(folder) as partial:
        (partial / "tokenizer.model").write_bytes(tokenizer.model)
        store.write_info(partial, {"fingerprint": tokenizer.fingerprint})
    return f"{config.kind}, {vocab_size} pieces"


def _write_rows(folder: Path, text: Path, text_info: dict[str, Any], tokenizer: Tokenizer, seq_len: int) -> str:
    """Returns what to report."""
    dtype = packing.row_dtype(tokenizer.vocab_size)
    sizes = {split: text_info["splits"][split]["bytes"] for split in SPLITS}
    tokens = dict.fromkeys(SPLITS, 0)
    with store.stage(folder) as partial:
        with progress("tokenising", sum(sizes.values())) as advance:

            def examples(split: str) -> store.Shards:
                read = 0

                def done(part: str) -> None:
                    nonlocal read
                    read += len(part.encode())
                    advance(len(part.encode()))

                def stream() -> Iterator[store.Example]:
                    for row, new_tokens in packing.rows(_texts(text, split), tokenizer, seq_len, done):
                        tokens[split] += new_tokens
                        yield {"tokens": row}

                return store.shards(stream(), sizes[split], lambda: read / sizes[split])

            splits = {split: examples(split) for split in SPLITS if sizes[split]}
            store.build(store.TokenRows(splits, partial, seq_len + 1, dtype))
        digest = store.Digest()
        n_rows = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            digest.add(split.encode())
            for example in store.read_split(partial, "token_rows", split):
                digest.add(example["tokens"].tobytes())
                n_rows[split] += 1
        info = {
            "splits": {split: {"rows": n_rows[split], "tokens": tokens[split]} for split in SPLITS},
            "dtype": dtype.name,
            "fingerprint": digest.hex(),
        }
        store.write_info(partial, info)
    return rows_summary(info, seq_len)


def text_summary(info: dict[str, Any]) -> str:
    """One line about the text."""
    sizes = ", ".join(f"{name} {split['bytes'] / 1e6:.2f} MB" for name, split in info["splits"].items())
    n_documents = sum(split["documents"] for split in info["splits"].values())
    left_out = ", ".join(f"{count} {reason}" for reason, count in info["skipped"].items())
    cut = "; few large documents: the end of each is held out" if info["cut"] else ""
    leaked = f"; {100 * info['leaked_share']:.1f}% of the test text's long lines occur in training"
    return f"{n_documents} documents ({sizes})" + (f"; left out: {left_out}" if left_out else "") + cut + leaked


def rows_summary(info: dict[str, Any], seq_len: int) -> str:
    """One line about the rows."""
    counts = ", ".join(f"{name} {split['rows']}" for name, split in info["splits"].items())
    n_tokens = sum(split["tokens"] for split in info["splits"].values())
    return f"{n_tokens / 1e6:.2f} M tokens in rows of {seq_len} ({counts})"


def _texts(folder: Path, split: str) -> Iterator[str]:
    return (example["text"].decode() for example in store.read_split(folder, "documents", split))


def _root(data: DataConfig, corpus: Corpus) -> Path:
    name = re.sub(r"[^\w.]+", "_", corpus.name)[:40]
    return Path(data.dir) / f"{name}-{_config_key(data)}-{_key(corpus.version)[:8]}"


def _find_root(data: DataConfig) -> Path | None:
    """The folder for the source as it is now; where the source is gone, the newest one made by the same config."""
    try:
        root = _root(data, open_corpus(data.source))
        return root if root.is_dir() else None
    except DataError:
        made = Path(data.dir).glob(f"*-{_config_key(data)}-????????/text/{store.INFO}")
        newest = max(made, key=lambda path: path.stat().st_mtime, default=None)
        return newest.parent.parent if newest else None


def _config_key(data: DataConfig) -> str:
    return _key(FORMAT, data.source.model_dump(mode="json"), data.validation_share, data.test_share)[:8]


def _tokenizer_name(config: TokenizerConfig, vocab_size: int, seed: int, text_info: dict[str, Any]) -> str:
    """Where all text is shown to the trainer, neither the seed nor the limit makes a difference."""
    sample = _key(seed, config.train_bytes)[:8] if _is_sampled(config, text_info) else "whole"
    return f"tokenizer-{config.kind}-{vocab_size}-{sample}"


def _is_sampled(config: TokenizerConfig, text_info: dict[str, Any]) -> bool:
    return text_info["splits"]["train"]["bytes"] > config.train_bytes


def _rows_folder(model: Path, seq_len: int) -> Path:
    return model.with_name(f"rows-{seq_len}-{model.name.removeprefix('tokenizer-')}")


def _load_tokenizer(folder: Path) -> Tokenizer:
    info = store.read_info(folder)
    tokenizer = tokenizer_module.load(folder / "tokenizer.model")
    if tokenizer.fingerprint != info["fingerprint"]:
        raise DataError(f"{folder} is damaged; delete it and prepare again")
    return tokenizer


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _lock(root: Path, report: Report) -> Iterator[None]:
    """Held by one process at a time; the operating system frees it when the process dies."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting: another process prepares {root}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _timed(report: Report, stage: str) -> Iterator[list[str]]:
    start = time.monotonic()
    lines: list[str] = []
    yield lines
    report(f"{stage}: {' '.join(lines)} [{time.monotonic() - start:.1f} s]")
