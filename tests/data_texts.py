"""Small corpora of made-up sentences, and the configs that prepare them."""

import random
from pathlib import Path

from llm_jax.data.config import DataConfig, FilesSource, TokenizerConfig

VOCAB = 400
BPE = TokenizerConfig()


def sentences(seed: int, n: int) -> str:
    """n lines of made-up words; lines of two seeds are never the same."""
    rng = random.Random(seed)
    words = [("".join(rng.choices("aeiou", k=1)) + "".join(rng.choices("bcdfgklmnprst", k=2))) for _ in range(40)]
    return "".join(f"{seed}: " + " ".join(rng.choices(words, k=9)) + ".\n" for _ in range(n))


def write_files(folder: Path, n: int = 40, lines: int = 30) -> Path:
    """n text files of about the same size."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"text{i:03}.txt").write_text(sentences(i, lines))
    return folder


def config(*paths: Path | str, into: Path, **fields: object) -> DataConfig:
    """Files as a source, rows of 32."""
    source = FilesSource(paths=tuple(map(str, paths)))
    return DataConfig(source=source, dir=str(into), **{"seq_len": 32, **fields})
