"""sentencepiece, lossless: any text comes back exactly, and every byte of it is accounted for by exactly one token."""

import dataclasses
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_PIECES, UNK_ID, TokenizerConfig
from llm_jax.data.errors import DataError

# sentencepiece writes a space as this character. Where it stands in a text, it becomes its three UTF-8 bytes' pieces.
SPACE = "\u2581"

# Encoding BPE in pieces of this many characters is twice as fast as whole files.
CHUNK = 2048
CHUNK_BORDER = re.compile(r"\n|(?<=[^ ])(?= )")

# Unigram training depends on the number of threads, so it is not the machine's.
TRAINING_THREADS = 4

# The trainer passes over longer lines; they are cut for it.
MAX_LINE = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A trained tokenizer; ids are those of SPECIAL_PIECES, then newline, 256 bytes, and the learned pieces."""

    model: bytes
    """The sentencepiece model."""
    kind: str
    """bpe or unigram."""

    bos_id = BOS_ID
    eos_id = EOS_ID
    pad_id = PAD_ID
    mask_id = MASK_ID
    control_ids = frozenset((PAD_ID, UNK_ID, BOS_ID, EOS_ID, MASK_ID))

    @functools.cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """sentencepiece itself; its own encode and decode are not lossless."""
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def vocab_size(self) -> int:
        """V, control ids included."""
        return self.processor.get_piece_size()

    @functools.cached_property
    def piece_texts(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes each id stands for; none for control ids."""
        return tuple(_bytes_of(self.processor, i) for i in range(self.vocab_size))

    @functools.cached_property
    def piece_bytes(self) -> np.ndarray:
        """int32 [V]: how many bytes of text each id stands for; over encode(text) they sum to the text's length."""
        return np.array([len(text) for text in self.piece_texts], np.int32)

    @functools.cached_property
    def word_starts(self) -> np.ndarray:
        """bool [V, 2]: whether a word begins with each id, and whether one begins after it, whatever stands there.

        Letters, digits, _ and what is not ASCII make up words, with the space in front that their first piece may have;
        every other piece is a word of its own, as it is in BERT's whole-word masking.
        """
        letters = [[len(text) > 0 and _in_a_word(text[at]) for at in (0, -1)] for text in self.piece_texts]
        return ~np.array(letters)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the pieces and their scores: two tokenizers with the same one encode alike."""
        pieces = ((self.processor.id_to_piece(i), self.processor.get_score(i)) for i in range(self.vocab_size))
        return hashlib.sha256(
            "\n".join([self.kind, *(f"{piece!r} {score!r}" for piece, score in pieces)]).encode()
        ).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]; never a control id, whatever the text spells."""
        return self.encode_many([text], threads=1)[0]

    def encode_many(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """int32 [n] for each text, on all cores unless told. Raises UnicodeEncodeError for lone surrogates."""
        for text in texts:
            text.encode()
        chunks_of = [[_chunks(part, self.kind) for part in text.split(SPACE)] for text in texts]
        flat = [chunk for parts in chunks_of for chunks in parts for chunk in chunks]
        threads = threads or len(os.sched_getaffinity(0))
        ids = iter(self.processor.encode(flat, return_type="numpy", num_threads=threads))
        return [self._joined(parts, ids) for parts in chunks_of]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; control ids are left out, and bytes that are no UTF-8 become U+FFFD."""
        texts = self.piece_texts
        return b"".join([texts[i] for i in ids]).decode(errors="replace")

    def _joined(self, parts: list[list[str]], ids: Iterator[np.ndarray]) -> np.ndarray:
        """One text's ids from its chunks' ones, with a literal SPACE between its parts."""
        arrays = [np.empty(0, np.int32)]
        for i, chunks in enumerate(parts):
            arrays += [self._space_ids] if i else []
            arrays += islice(ids, len(chunks))
        return np.concatenate(arrays)

    @functools.cached_property
    def _space_ids(self) -> np.ndarray:
        return np.array([self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()], np.int32)


def train(documents: Iterable[str], config: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Raises ConfigError where vocab_size is not what the text allows; deterministic."""
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents, config.train_bytes),
            model_writer=written,
            model_type=config.kind,
            vocab_size=vocab_size,
            # Lossless: nothing is normalised, and what was never seen is spelled in bytes.
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * MAX_LINE,
            # A user symbol, since the trainer sees lines; the others are control symbols, which text cannot spell.
            user_defined_symbols=["\n"],
            control_symbols=list(SPECIAL_PIECES[MASK_ID:]),
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_piece=SPECIAL_PIECES[PAD_ID],
            unk_piece=SPECIAL_PIECES[UNK_ID],
            bos_piece=SPECIAL_PIECES[BOS_ID],
            eos_piece=SPECIAL_PIECES[EOS_ID],
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _in_our_words(error, vocab_size) from error
    return Tokenizer(written.getvalue(), config.kind)


def load(path: Path) -> Tokenizer:
    """Raises DataError where the file is no sentencepiece model."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]  made at run time
    try:
        raw = path.read_bytes()
        model.ParseFromString(raw)
    except (OSError, DecodeError) as error:
        raise DataError(f"{path} is not a readable sentencepiece model: {error}") from error
    return Tokenizer(raw, "bpe" if model.trainer_spec.model_type == model.trainer_spec.BPE else "unigram")


def _lines(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines for the trainer until max_bytes are given."""
    given = 0
    for text in documents:
        for line in text.replace(SPACE, "\n").split("\n"):
            for start in range(0, len(line), MAX_LINE):
                part = line[start : start + MAX_LINE]
                yield part
                given += len(part.encode())
                if given >= max_bytes:
                    return


def _chunks(text: str, kind: str) -> list[str]:
    """BPE never joins what stands on both sides of a newline, nor a word and the space after it: cut there.

    Unigram is not cut, since sums of scores in another order can break ties otherwise.
    """
    if kind == "unigram":
        return [text]
    chunks, start = [], 0
    while start + CHUNK < len(text) and (border := CHUNK_BORDER.search(text, start + CHUNK)):
        chunks.append(text[start : border.end()])
        start = border.end()
    return [*chunks, text[start:]]


def _in_a_word(byte: int) -> bool:
    return byte >= 128 or byte == ord("_") or chr(byte).isalnum()


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    if processor.is_control(i) or processor.is_unknown(i):
        return b""
    piece = processor.id_to_piece(i)
    return bytes([int(piece[1:-1], 16)]) if processor.is_byte(i) else piece.replace(SPACE, " ").encode()


def _in_our_words(error: RuntimeError, vocab_size: int) -> Exception:
    """sentencepiece's complaint as ours; what it does not name is passed on."""
    message = str(error)
    if found := re.search(r"<= (\d+)\.", message):
        n = found[1]
        return ConfigError(
            f"model.vocab_size = {vocab_size}, but the corpus yields only {n} pieces; set model.vocab_size={n}"
        )
    if found := re.search(r"\d+ vs (\d+)\.", message):
        n = found[1]
        return ConfigError(
            f"model.vocab_size = {vocab_size}, but bytes, special tokens and the corpus's characters are {n} pieces;"
            f" set model.vocab_size to {n} or more"
        )
    if "sentences_.empty()" in message:
        return DataError("the training text has nothing but blank lines; a tokenizer cannot be trained on it")
    return DataError(f"the tokenizer cannot be trained: {message.splitlines()[-1]}")
