"""The data's and the tokenizer's sections of a run."""

from typing import Annotated, Literal

import pydantic
from annotated_types import Ge, Lt, MinLen

from llm_jax.config import Config, ConfigError

# Every tokenizer's first ids; sentencepiece control symbols, so no text can spell them.
SPECIAL_PIECES = ("<pad>", "<unk>", "<bos>", "<eos>", "<mask>")
PAD_ID, UNK_ID, BOS_ID, EOS_ID, MASK_ID = range(len(SPECIAL_PIECES))


class StdlibSource(Config):
    """The Python standard library's own source, without tests: on every machine, about 11 MB."""

    kind: Literal["stdlib"] = "stdlib"
    """Where the text comes from."""


class FilesSource(Config):
    """Text files of your own: one document a file, or one a line of .jsonl and .jsonl.gz."""

    kind: Literal["files"] = "files"
    """Where the text comes from."""
    paths: Annotated[tuple[str, ...], MinLen(1)]
    """Files, folders or globs (** is recursive); a folder means every .txt, .md, .py, .jsonl and .jsonl.gz below it,
    hidden ones left out."""
    text_field: str = "text"
    """The field that holds a document in .jsonl files."""


class TfdsSource(Config):
    """A dataset of the tensorflow-datasets catalogue, or a directory already prepared as array_record."""

    kind: Literal["tfds"] = "tfds"
    """Where the text comes from."""
    dataset: str
    """A catalogue name such as lm1b, or the path of a prepared directory (.../name/version)."""
    split: str = "train"
    """The split, slices allowed: train[:10%]."""
    text_field: str = "text"
    """The feature that holds a document."""
    data_dir: str | None = None
    """TFDS's own data directory; null is its default."""


Source = Annotated[StdlibSource | FilesSource | TfdsSource, pydantic.Field(discriminator="kind")]


class DataConfig(Config):
    """Which text, and how it becomes rows."""

    source: Source = StdlibSource()
    """Where the text comes from: kind=stdlib, files or tfds."""
    seq_len: Annotated[int, Ge(2)] = 256
    """Tokens of one row that the model reads (T); rows are stored with one more."""
    dir: str = "data"
    """Prepared datasets live in a folder of their own below this one, named by what made them."""
    validation_share: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the text held out for looking at during training."""
    test_share: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the text held out for the final figures."""
    cross_documents: bool = False
    """Let attention look across document borders inside a row."""
    prefetch: Annotated[int, Ge(0)] = 2
    """Batches read ahead by threads; 0 reads in the loop."""


class TokenizerConfig(Config):
    """A sentencepiece tokenizer trained on the training split; its size is model.vocab_size."""

    kind: Literal["bpe", "unigram"] = "bpe"
    """sentencepiece's algorithm."""
    train_bytes: Annotated[int, Ge(1000)] = 50_000_000
    """At most this much training text, sampled by the seed, is shown to the trainer."""


def check(data: DataConfig) -> None:
    """Raises ConfigError where two fields contradict each other."""
    if data.validation_share + data.test_share > 0.5:
        raise ConfigError(
            "data.validation_share + data.test_share is more than 0.5; most text must be left to train on"
        )
