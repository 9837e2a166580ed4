"""Where documents come from: the standard library, files of one's own, or a TFDS dataset; read as a stream."""

import fnmatch
import glob
import gzip
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from llm_jax.data.config import FilesSource, Source, StdlibSource, TfdsSource
from llm_jax.data.errors import DataError

# A longer document becomes several, cut at line ends: encoding one takes a hundred times its size at worst, and a
# record of 2 GB cannot be written at all.
MAX_DOCUMENT_BYTES = 8 << 20

EMPTY, INVALID = "empty", "invalid UTF-8"

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")

# Tests are absent from some installations; codec tables are near copies of each other; what a build writes differs
# from machine to machine; installed packages are not the library.
NOT_LIBRARY = (
    *("test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"),
    *("_sysconfigdata*", "_sysconfig_vars*", "config-*", "sitecustomize.py", "usercustomize.py"),
)
HIDDEN = (".*",)


@dataclass(frozen=True)
class Document:
    """One document; documents of one group are never divided between training and held-out text."""

    key: str
    group: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A document that cannot be used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """A source, looked at but not yet read; read() starts from the beginning each time, in the same order."""

    name: str
    version: str
    """Changes whenever what read() gives may change."""
    size: int
    """Roughly the bytes read() goes through."""
    read: Callable[[], Iterator[Document | Skipped]]


def open_corpus(source: Source) -> Corpus:
    """Raises DataError where there is nothing to read."""
    match source:
        case StdlibSource():
            return _stdlib()
        case FilesSource():
            return _files(source)
        case TfdsSource():
            # Its import takes as long as preparing a small corpus.
            from llm_jax.data.tfds_source import open_tfds

            name, version, size, texts = open_tfds(source)
            return Corpus(name, version, size, lambda: _documents(texts()))


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in _walk(root, NOT_LIBRARY) if path.suffix == ".py"]
    if not paths:
        raise DataError(f"the Python standard library's source is not in {root}; set data.source.kind=files")
    files = [(p.relative_to(root).as_posix(), p) for p in paths]

    def read() -> Iterator[Document | Skipped]:
        for key, path in _shuffled(files):
            group = key.split("/")[0].removesuffix(".py")
            yield from _documents([(key, _read_bytes(path))], group)

    version = _digest(platform.python_version(), *sorted(f"{key} {path.stat().st_size}" for key, path in files))
    return Corpus("stdlib", version, sum(path.stat().st_size for _, path in files), read)


def _walk(root: Path, leave_out: Collection[str]) -> Iterator[Path]:
    """The files below a folder, but not below those that fit a pattern."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _fits(name, leave_out)]
        yield from (path for name in names if not _fits(name, leave_out) and (path := Path(folder, name)).is_file())


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _files(source: FilesSource) -> Corpus:
    paths = sorted({path for pattern in source.paths for path in _expand(pattern)})
    # Keys are relative to what the files have in common, so that the same files elsewhere give the same dataset.
    root = Path(os.path.commonpath([path.parent for path in paths]))
    files = [(path.relative_to(root).as_posix(), path) for path in paths]

    def read() -> Iterator[Document | Skipped]:
        for key, path in _shuffled(files):
            is_jsonl = path.name.endswith(JSONL_SUFFIXES)
            yield from _documents(_jsonl(key, path, source.text_field) if is_jsonl else _parts(key, path))

    stats = [(key, path.stat()) for key, path in files]
    version = _digest(*(f"{key} {stat.st_size} {stat.st_mtime_ns}" for key, stat in stats))
    return Corpus(root.name or "files", version, sum(stat.st_size for _, stat in stats), read)


def _expand(pattern: str) -> list[Path]:
    """The files a path, folder or glob means."""
    path = Path(pattern).expanduser().absolute()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in _walk(path, HIDDEN) if p.name.endswith(TEXT_SUFFIXES + JSONL_SUFFIXES)]
        hint = f"no {' '.join(TEXT_SUFFIXES + JSONL_SUFFIXES)} files below this folder"
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        hint = "no such file" if not glob.has_magic(pattern) else "no file matches"
    if not found:
        raise DataError(f"data.source.paths: {pattern}: {hint}")
    return found


def _shuffled(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """In the order of their keys' hashes: the same everywhere, and neighbours in a folder do not end up in one row."""
    return sorted(files, key=lambda file: hashlib.md5(file[0].encode()).digest())


def _parts(key: str, path: Path) -> Iterator[tuple[str, bytes]]:
    """A file in parts of at most MAX_DOCUMENT_BYTES, so that a huge one is never held whole."""
    if path.stat().st_size <= MAX_DOCUMENT_BYTES:
        yield key, _read_bytes(path)
        return
    rest, part = b"", 0
    with _opened(path) as file:
        while block := file.read(MAX_DOCUMENT_BYTES - len(rest)):
            block = rest + block
            end = len(block) if len(block) < MAX_DOCUMENT_BYTES else _cut_point(block)
            yield f"{key}#{part:05}", block[:end]
            rest, part = block[end:], part + 1
    if rest:
        yield f"{key}#{part:05}", rest


def _cut_point(block: bytes) -> int:
    """After the last line end, or else before the last UTF-8 character, which may be incomplete."""
    if end := block.rfind(b"\n") + 1:
        return end
    end = len(block) - 1
    while end > 1 and block[end] & 0b1100_0000 == 0b1000_0000:
        end -= 1
    return end


def _jsonl(key: str, path: Path, field: str) -> Iterator[tuple[str, bytes | Skipped]]:
    """The named field of each line."""
    number = 0
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield f"{key}:{number:09}", _field(f"{path}:{number}", line, field)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise DataError(f"{path}: unreadable after line {number}: {error}") from error


def _field(where: str, line: bytes, field: str) -> bytes | Skipped:
    if not line.strip():
        return b""
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Skipped(where, INVALID)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no text in field {field!r} (there is: {fields}); set data.source.text_field")
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return Skipped(where, INVALID)


def _documents(texts: Iterable[tuple[str, bytes | Skipped]], group: str = "") -> Iterator[Document | Skipped]:
    """Decoded strictly and losslessly; every document is its own group unless one is given."""
    for key, raw in texts:
        if isinstance(raw, Skipped):
            yield raw
        elif not raw:
            yield Skipped(key, EMPTY)
        else:
            yield from _decoded(key, raw, group)


def _decoded(key: str, raw: bytes, group: str) -> Iterator[Document | Skipped]:
    try:
        raw.decode()
    except UnicodeDecodeError:
        yield Skipped(key, INVALID)
        return
    if len(raw) <= MAX_DOCUMENT_BYTES:
        yield Document(key, group or key, raw.decode())
        return
    part = 0
    while raw:
        end = len(raw) if len(raw) <= MAX_DOCUMENT_BYTES else _cut_point(raw[:MAX_DOCUMENT_BYTES])
        yield Document(f"{key}#{part:05}", group or f"{key}#{part:05}", raw[:end].decode())
        raw, part = raw[end:], part + 1


def _opened(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path)) if path.name.endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
