"""Small pictures as data that a page holds itself: PNG (ISO 15948), written with zlib alone."""

import base64
import struct
import zlib

import numpy as np

# A share of 1; shares are shown by the square root, so that small ones are seen.
FULL = 255


def shades(shares_TS: np.ndarray) -> np.ndarray:
    """uint8 shades of numbers from 0 to 1; the page's script reads them back as (shade / FULL)²."""
    return np.rint(FULL * np.sqrt(shares_TS)).astype(np.uint8)


def png(shades_TS: np.ndarray, colour: tuple[int, int, int]) -> bytes:
    """A picture of one colour, as opaque as each shade says: it fits light and dark pages."""
    height, width = shades_TS.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    # Each line begins with the number of its filter: none.
    lines = np.pad(shades_TS, ((0, 0), (1, 0))).tobytes()
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(colour) * (FULL + 1)),
        (b"tRNS", bytes(range(FULL + 1))),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def as_address(picture: bytes) -> str:
    """A PNG as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
