"""A checkpoint's manifest: size and SHA-256 of every file, written last, so that no damage goes unnoticed.

Array data carries no checksum of its own: without this, a flipped bit would be restored as a slightly different weight.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

# How long a checkpoint stays: until the next one is whole, among the newest few, for good.
Kind = Literal["temporary", "regular", "permanent"]

NAME = "manifest.json"

# Hashing lets go of the interpreter, and one core does about 1 GB/s.
THREADS = 4


class Damaged(Exception):
    """A manifest that is missing or not as it was written."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """sizes: bytes of each file; digests: its SHA-256 in hex; both by the path inside the checkpoint's folder."""

    step: int
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    kind: Kind = "regular"


def retired(kinds: Mapping[int, Kind], keep: int) -> list[int]:
    """The numbers of the checkpoints that are no longer kept, given the kind of each: the newest always is."""
    newest = max(kinds, default=0)
    regular = sorted(number for number, kind in kinds.items() if kind == "regular")
    leaving = [number for number, kind in kinds.items() if kind == "temporary"] + regular[:-keep]
    return sorted(number for number in leaving if number != newest)


def numbers(directory: Path) -> list[int]:
    """The numbers of a directory's checkpoints that were completed, oldest first; their files are not looked at."""
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below folder, the manifest left out. Raises OSError."""
    sizes = {}
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(parent, name)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    sizes.pop(NAME, None)
    return dict(sorted(sizes.items()))


def share(sizes: Mapping[str, int], index: int, count: int) -> list[str]:
    """The files that are for process index of count to hash: the largest first, each to whoever has least so far."""
    load = [0] * count
    mine = []
    for path in sorted(sizes, key=lambda path: (-sizes[path], path)):
        process = load.index(min(load))
        load[process] += sizes[path] + 1
        if process == index:
            mine.append(path)
    return mine


def file_digests(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files, in hex. Raises OSError."""
    paths = list(paths)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(paths, threads.map(lambda path: _digest(folder / path), paths), strict=True))


def encode(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file, which end with a checksum of themselves."""
    files = {path: {"size": manifest.sizes[path], "sha256": manifest.digests[path]} for path in sorted(manifest.sizes)}
    content = {"format": 1, "step": manifest.step, "files": files}
    if manifest.kind != "regular":
        content["kind"] = manifest.kind
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1).encode()


def decode(data: bytes) -> Manifest:
    """The manifest of a file's bytes. Raises Damaged if they are not what `encode` wrote, to the last bit."""
    try:
        files = json.loads(data)
        manifest = Manifest(
            files["step"],
            {path: entry["size"] for path, entry in files["files"].items()},
            {path: entry["sha256"] for path, entry in files["files"].items()},
            files.get("kind", "regular"),
        )
        intact = encode(manifest) == data
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{NAME} cannot be read") from error
    if not intact:
        raise Damaged(f"{NAME} does not match its own checksum")
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder. Raises Damaged."""
    try:
        return decode((folder / NAME).read_bytes())
    except FileNotFoundError as error:
        raise Damaged(f"{NAME} is missing") from error
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror}") from error


def findings(folder: Path, manifest: Manifest, index: int, count: int) -> list[str]:
    """What is wrong with the files that are for process index of count to look at, a phrase each; empty if nothing."""
    try:
        sizes = file_sizes(folder)
        missing = [f"{path} is missing" for path in manifest.sizes if path not in sizes]
        extra = [f"{path} does not belong to it" for path in sizes if path not in manifest.sizes]
        changed = [
            f"{path} has {sizes[path]} bytes, not {size}"
            for path, size in manifest.sizes.items()
            if sizes.get(path, size) != size
        ]
        if missing or extra or changed:
            return missing + extra + changed
        digests = file_digests(folder, share(manifest.sizes, index, count))
    except OSError as error:
        return [f"{error.filename} cannot be read: {error.strerror}"]
    return [f"{path} has changed" for path, digest in digests.items() if digest != manifest.digests[path]]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error
