"""Near duplicates out first, then whole groups to training, validation and test, by the hashes of their names."""

import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llm_jax.data.config import DataConfig
from llm_jax.data.corpus import EMPTY, Document, Skipped
from llm_jax.data.errors import DataError

SPLITS: tuple[str, ...] = ("train", "validation", "test")
DROPPED = 255

SHINGLE_LINES = 5
DUPLICATE_SHARE = 0.5
# Shingles remembered (about 100 bytes each). Beyond it only every second hash is kept, then every fourth ..., so that
# of very many very short texts not every duplicate is found.
MAX_SHINGLES = 8_000_000

LONG_LINE = 20
# Held-out lines whose occurrence in training is looked up.
MAX_LONG_LINES = 1_000_000

NAMED_SKIPS = 5
NEAR_DUPLICATE = "near duplicate"
UNREMARKABLE = (EMPTY, NEAR_DUPLICATE)


@dataclass(frozen=True)
class Plan:
    """Which split each document goes to, by its number in reading order; N = documents read, skipped ones included."""

    split_N: np.ndarray
    """uint8 [N]: index into SPLITS, or DROPPED."""
    bytes_N: np.ndarray
    """int64 [N]: to notice a source that changes between two readings."""
    cut: tuple[float, float] | None
    """Where every document is cut into its three splits, as shares of its length; None: documents stay whole."""
    skipped: dict[str, int]
    """Reason -> documents left out."""
    named_skips: list[str]
    """The first few that somebody may want to mend."""
    with_nul: int
    """Kept documents that contain a NUL character; it is kept, too."""

    def total_bytes(self) -> int:
        """Of what is kept."""
        return int(self.bytes_N[self.split_N != DROPPED].sum())

    def split_sizes(self) -> dict[str, int]:
        """Bytes of each split; approximate where documents are cut."""
        if self.cut is not None:
            borders = (0.0, *self.cut, 1.0)
            return {split: round((borders[i + 1] - borders[i]) * self.total_bytes()) for i, split in enumerate(SPLITS)}
        return {split: int(self.bytes_N[self.split_N == i].sum()) for i, split in enumerate(SPLITS)}


def make_plan(documents: Iterable[Document | Skipped], data: DataConfig, advance: Callable[[int], None]) -> Plan:
    """Reads everything once. Raises DataError where nothing is left."""
    shingles = Shingles()
    skipped: Counter[str] = Counter()
    named: list[str] = []
    groups, sizes, with_nul = array("Q"), array("q"), 0
    for document in documents:
        if isinstance(document, Skipped):
            size, group, reason = 0, 0, document.reason
        else:
            size, group = len(document.text.encode()), _hash64(document.group)
            reason = NEAR_DUPLICATE if shingles.seen(document.text) else ""
        if reason:
            skipped[reason] += 1
            if reason not in UNREMARKABLE and len(named) < NAMED_SKIPS:
                named.append(f"{document.key}: {reason}")
        else:
            assert isinstance(document, Document)
            with_nul += "\0" in document.text
        groups.append(group)
        sizes.append(-1 if reason else size)
        advance(size)
    bytes_N = np.asarray(sizes, np.int64)
    if not (bytes_N > 0).any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no documents"
        raise DataError(f"data.source ({data.source.kind}) has no usable text: {reasons}")
    split_N, cut = assign(np.asarray(groups, np.uint64), bytes_N, data.validation_share, data.test_share)
    return Plan(split_N, bytes_N, cut, dict(skipped), named, with_nul)


def assign(
    group_N: np.ndarray, bytes_N: np.ndarray, validation_share: float, test_share: float
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Fills test, then validation, with groups in the order of their hashes; what would overfill a split is passed by.

    group_N: uint64; bytes_N: int64, negative = dropped. Where a few large groups make that impossible, the end of
    every document is held out instead: returns the shares at which documents are cut, else None.
    """
    kept_N = bytes_N >= 0
    split_N = np.where(kept_N, 0, DROPPED).astype(np.uint8)
    group_G, index_N = np.unique(group_N[kept_N], return_inverse=True)
    bytes_G = np.bincount(index_N, bytes_N[kept_N])
    split_G = np.zeros(len(group_G), np.uint8)
    for split, share in (("test", test_share), ("validation", validation_share)):
        wanted, taken = share * bytes_G.sum(), 0.0
        for g in range(len(group_G)):
            if taken >= 0.9 * wanted:
                break
            if not split_G[g] and taken + bytes_G[g] <= 1.1 * wanted:
                split_G[g] = SPLITS.index(split)
                taken += bytes_G[g]
        if taken < 0.5 * wanted:
            return split_N, (1 - validation_share - test_share, 1 - test_share)
    split_N[kept_N] = split_G[index_N]
    return split_N, None


def documents_of(split: str, documents: Iterable[Document | Skipped], plan: Plan) -> Iterator[Document]:
    """The documents of one split, reading everything again. Raises DataError where the source has changed."""
    for n, document in enumerate(documents):
        if n >= len(plan.split_N):
            raise DataError("the source grew while it was read; prepare again")
        if isinstance(document, Skipped) or plan.split_N[n] == DROPPED:
            continue
        if len(document.text.encode()) != plan.bytes_N[n]:
            raise DataError(f"{document.key} changed while it was read; prepare again")
        if plan.cut is None:
            if SPLITS[plan.split_N[n]] == split:
                yield document
        elif text := _part(document.text, split, plan.cut):
            yield Document(document.key, document.group, text)


def _part(text: str, split: str, cut: tuple[float, float]) -> str:
    """A split's part of a document, cut after the next line end, or anywhere where lines are too long."""
    borders = [0]
    for share in cut:
        at = round(share * len(text))
        borders.append(text.find("\n", at, at + max(len(text) // 100, 1)) + 1 or at)
    borders.append(len(text))
    n = SPLITS.index(split)
    return text[borders[n] : borders[n + 1]]


class Shingles:
    """Hashed runs of five lines seen so far; every line stripped, blank ones left out."""

    def __init__(self, limit: int = MAX_SHINGLES) -> None:
        self.hashes: set[int] = set()
        self.every = 1
        self.limit = limit

    def seen(self, text: str) -> bool:
        """Whether more than half of the text's shingles were in earlier texts; if not, they are remembered."""
        hash_N = _shingles(text)
        shingles = set(hash_N[hash_N % np.uint64(self.every) == 0].tolist())
        if shingles and len(shingles & self.hashes) > DUPLICATE_SHARE * len(shingles):
            return True
        self.hashes |= shingles
        while len(self.hashes) > self.limit:
            self.every *= 2
            self.hashes = {h for h in self.hashes if h % self.every == 0}
        return False


def _shingles(text: str) -> np.ndarray:
    """uint64 hashes of the text's shingles; of a shorter text, one of all its lines."""
    crc_L = np.array([zlib.crc32(line.encode()) for raw in text.split("\n") if (line := raw.strip())], np.uint64)
    n = max(len(crc_L) - SHINGLE_LINES + 1, 1)
    hash_N = np.zeros(n, np.uint64)
    for i in range(min(SHINGLE_LINES, len(crc_L))):
        hash_N = (hash_N + crc_L[i : i + n] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hash_N ^= hash_N >> np.uint64(29)
    return hash_N


def leaked_share(train: Iterable[str], test: Iterable[str]) -> float:
    """Of the test text's lines longer than 20 characters, the share that occurs verbatim in training."""
    lines: Counter[str] = Counter()
    for text in test:
        lines.update(line for raw in text.split("\n") if len(line := raw.strip()) > LONG_LINE)
        if len(lines) > MAX_LONG_LINES:
            break
    wanted, found = lines.keys(), set[str]()
    for text in train:
        found.update(wanted & {raw.strip() for raw in text.split("\n")})
    return sum(lines[line] for line in found) / max(lines.total(), 1)


def _hash64(group: str) -> int:
    return int.from_bytes(hashlib.md5(group.encode()).digest()[:8], "big")
