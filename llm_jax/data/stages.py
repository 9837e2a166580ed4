"""The three stages of preparing data, each from the one before it, and what is told of them.

Every fingerprint is of what is read back from the disk, decoded: files of equal content can differ in their bytes.
"""

import hashlib
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data import packing, store, tokenizer
from llm_jax.data.config import PAD_ID, DataConfig, TokenizerConfig
from llm_jax.data.corpus import Corpus, Document
from llm_jax.data.errors import DataError
from llm_jax.data.progress import progress
from llm_jax.data.splits import SPLITS, documents_of, leaked_share, make_plan
from llm_jax.data.tokenizer import Tokenizer

DOCUMENTS, ROWS = "documents", "token_rows"
MODEL = "tokenizer.model"

Info = dict[str, Any]


def write_text(folder: Path, corpus: Corpus, data: DataConfig) -> str:
    """Reads the source twice: to decide, and to write. Returns what to report."""
    with progress("reading", corpus.size) as advance:
        plan = make_plan(corpus.read(), data, advance)
    with store.stage(folder) as partial:
        with progress("writing text", corpus.size) as advance:
            splits = {}
            for split, size in plan.split_sizes().items():
                found = documents_of(split, corpus.read(), plan)
                if first := next(found, None):
                    meter = store.Meter(size, advance)
                    examples = _text_examples(itertools.chain([first], found), meter)
                    splits[split] = store.shards(examples, meter)
            store.build(store.Documents(splits, partial))
        info = {
            "source": data.source.model_dump(mode="json"),
            "python": platform.python_version(),
            **_text_contents(partial),
            "skipped": plan.skipped,
            "named_skips": plan.named_skips,
            "with_nul": plan.with_nul,
            "cut": plan.cut is not None,
            "leaked_share": leaked_share(texts(partial, "train"), texts(partial, "test")),
        }
        if sum(split["bytes"] for split in info["splits"].values()) != plan.total_bytes():
            raise DataError(f"{folder}: what was written cannot be read back; is the disk damaged?")
        store.write_info(partial, info)
    return "\n  left out: ".join([text_summary(info), *plan.named_skips])


def write_tokenizer(
    folder: Path, text: Path, text_info: Info, config: TokenizerConfig, vocab_size: int, seed: int
) -> str:
    """Trains on the training split, or on documents of it drawn by the seed. Returns what to report."""
    order = None
    if is_sampled(config, text_info):
        n_documents = text_info["splits"]["train"]["documents"]
        # Not numpy's generators: what they give may change from version to version.
        order = sorted(range(n_documents), key=lambda i: hashlib.md5(f"{seed}:{i}".encode()).digest())
    with progress("training the tokenizer", 0):
        trained = tokenizer.train(texts(text, "train", order), config, vocab_size)
    with store.stage(folder) as partial:
        (partial / MODEL).write_bytes(trained.model)
        store.write_info(partial, {"fingerprint": trained.fingerprint})
    return f"{config.kind}, {vocab_size} pieces"


def is_sampled(config: TokenizerConfig, text_info: Info) -> bool:
    """Whether the trainer sees less than all training text."""
    return text_info["splits"]["train"]["bytes"] > config.train_bytes


def write_rows(folder: Path, text: Path, text_info: Info, encoder: Tokenizer, seq_len: int) -> str:
    """Encodes and packs each split. Returns what to report."""
    sizes = {split: text_info["splits"][split]["bytes"] for split in SPLITS}
    dtype = packing.row_dtype(encoder.vocab_size)
    with store.stage(folder) as partial:
        with progress("tokenising", sum(sizes.values())) as advance:
            splits = {}
            for split, size in sizes.items():
                if size:
                    meter = store.Meter(size, advance)
                    rows = packing.rows(_metered(texts(text, split), meter.add), encoder, seq_len)
                    splits[split] = store.shards(({"tokens": row_U} for row_U in rows), meter)
            store.build(store.TokenRows(splits, partial, seq_len + 1, dtype))
        info = _row_contents(partial) | {"dtype": dtype.name}
        store.write_info(partial, info)
    return rows_summary(info, seq_len)


def texts(folder: Path, split: str, order: Iterable[int] | None = None) -> Iterator[str]:
    """The texts of a split, in stored order or in the one given."""
    return (example["text"].decode() for example in store.read_split(folder, DOCUMENTS, split, order))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises DataError where it is not what was written."""
    info = store.read_info(folder)
    loaded = tokenizer.load(folder / MODEL)
    if loaded.fingerprint != info["fingerprint"]:
        raise DataError(f"{folder} is damaged; delete it and prepare again")
    return loaded


def text_summary(info: Info) -> str:
    """One line about the text."""
    sizes = ", ".join(f"{name} {split['bytes'] / 1e6:.2f} MB" for name, split in info["splits"].items())
    n_documents = sum(split["documents"] for split in info["splits"].values())
    parts = [f"{n_documents} documents ({sizes})"]
    if info["skipped"]:
        parts.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in info["skipped"].items()))
    if info["cut"]:
        parts.append("few large documents: the end of each is held out")
    parts.append(f"{100 * info['leaked_share']:.1f}% of the test text's long lines occur in training")
    return "; ".join(parts)


def rows_summary(info: Info, seq_len: int) -> str:
    """One line about the rows."""
    counts = ", ".join(f"{name} {split['rows']}" for name, split in info["splits"].items())
    n_tokens = sum(split["tokens"] for split in info["splits"].values())
    return f"{n_tokens / 1e6:.2f} M tokens in rows of {seq_len} ({counts})"


def _text_examples(documents: Iterable[Document], meter: store.Meter) -> Iterator[store.Example]:
    for document in documents:
        meter.add(len(document.text.encode()))
        yield {"key": document.key, "text": document.text}


def _metered(parts: Iterable[str], add: Callable[[int], None]) -> Iterator[str]:
    for part in parts:
        yield part
        add(len(part.encode()))


def _text_contents(folder: Path) -> Info:
    """Counts of each split, and the fingerprint of all keys and texts in order."""
    digest = store.Digest()
    splits = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    for split, counts in splits.items():
        digest.add(split.encode())
        for example in store.read_split(folder, DOCUMENTS, split):
            digest.add(example["key"])
            digest.add(example["text"])
            counts["documents"] += 1
            counts["bytes"] += len(example["text"])
    return {"splits": splits, "fingerprint": digest.hex()}


def _row_contents(folder: Path) -> Info:
    """Counts of each split, and the fingerprint of all rows in order; a token in two rows is counted once."""
    digest = store.Digest()
    splits = {split: {"rows": 0, "tokens": 0} for split in SPLITS}
    for split, counts in splits.items():
        digest.add(split.encode())
        for example in store.read_split(folder, ROWS, split):
            row_U = example["tokens"]
            digest.add(row_U.astype(np.int32).tobytes())
            counts["tokens"] += int((row_U != PAD_ID).sum()) - (counts["rows"] > 0)
            counts["rows"] += 1
    return {"splits": splits, "fingerprint": digest.hex()}
