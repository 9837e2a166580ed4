"""Tokenizers lose nothing, cannot be tricked, and count every byte once."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_jax.config import ConfigError
from llm_jax.data.config import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_PIECES, UNK_ID, TokenizerConfig
from llm_jax.data.errors import DataError
from llm_jax.data.tokenizer import CHUNK, SPACE, Tokenizer, load, train

VOCAB = 700
KINDS = tuple(TokenizerConfig(kind=kind) for kind in ("bpe", "unigram"))

# Everything that somebody's tokenizer has stumbled over.
NASTY = [
    *" \n\r\t\0ab1.é日🎉\ufeff\u2028\x85\u0301\u200d\ufffd\U0010ffff\x7f\x1a",
    *(SPACE, "\u2047", "\u2585", "  ", "\r\n", "\n\n", "    ", "def f(self):\n", "the ", "0123456789"),
    *(*SPECIAL_PIECES, "<s>", "</s>", "[MASK]", "<0x41>", "<0x0A>", "<|endoftext|>", f"<{SPACE}>"),
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    """Files of the standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return [path.read_text() for path in paths]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def tokenizer(request: pytest.FixtureRequest, library: list[str]) -> Tokenizer:
    return train(library[:20], request.param, VOCAB)


def nasty_texts() -> list[str]:
    rng = random.Random(0)
    anything = [*range(0xD800), *range(0xE000, 0x110000)]  # all but surrogates
    return [
        "",
        SPACE,
        *NASTY,
        *("".join(rng.choices(NASTY, k=rng.randrange(60))) for _ in range(400)),
        *("".join(chr(i) for i in rng.choices(anything, k=50)) for _ in range(40)),
    ]


def test_any_text_comes_back_and_its_bytes_are_counted_once(tokenizer: Tokenizer, library: list[str]) -> None:
    texts = nasty_texts() + library
    for text, ids in zip(texts, tokenizer.encode_many(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
        assert ids.dtype == np.int32
        assert not tokenizer.control_ids.intersection(ids.tolist()), "text must not become a control token"


def test_texts_encoded_together_are_those_encoded_alone(tokenizer: Tokenizer) -> None:
    texts = nasty_texts()
    assert tokenizer.encode_many([]) == []
    for threads in (1, 3):
        for text, ids in zip(texts, tokenizer.encode_many(texts, threads), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_encoding_in_chunks_gives_the_ids_of_the_whole(tokenizer: Tokenizer, library: list[str]) -> None:
    one_line = " ".join("".join(library).split("\n"))[: 40 * CHUNK]
    no_spaces = one_line.replace(" ", "")
    for text in [*library, one_line, no_spaces, "word " * CHUNK, " " * 5 * CHUNK, "\n" * 3 * CHUNK]:
        if SPACE not in text:
            assert tokenizer.encode(text).tolist() == tokenizer.processor.encode(text)


def test_control_ids_are_fixed_and_empty(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.processor.id_to_piece(i) for i in (PAD_ID, UNK_ID, BOS_ID, EOS_ID, MASK_ID)]
    assert pieces == list(SPECIAL_PIECES)
    assert tokenizer.piece_bytes[sorted(tokenizer.control_ids)].tolist() == [0] * 5
    assert (tokenizer.piece_bytes > 0).sum() == VOCAB - 5 == tokenizer.vocab_size - 5
    ids = tokenizer.encode("a\nb").tolist()
    assert tokenizer.decode([BOS_ID, *ids, MASK_ID, EOS_ID, PAD_ID]) == "a\nb"


def test_ids_that_are_no_text_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    euro = tokenizer.encode("\u20ac").tolist()
    assert len(euro) == 3
    assert tokenizer.decode(euro[:2]) == "\ufffd"


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_training_is_deterministic(config: TokenizerConfig, library: list[str]) -> None:
    one, other = (train(iter(library[:8]), config, VOCAB) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != train(library[1:8], config, VOCAB).fingerprint


def test_only_train_bytes_are_shown(library: list[str]) -> None:
    shown = []

    def documents() -> Iterator[str]:
        for text in library:
            shown.append(len(text.encode()))
            yield text

    train(documents(), TokenizerConfig(train_bytes=300_000), VOCAB)
    assert sum(shown[:-1]) < 310_000 < sum(len(text) for text in library)
    assert len(shown) < len(library)


def test_a_saved_tokenizer_is_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model)
    loaded = load(path)
    assert loaded.kind == tokenizer.kind
    assert loaded.fingerprint == tokenizer.fingerprint
    path.write_bytes(b"no model")
    with pytest.raises(DataError, match=r"tokenizer\.model is not a readable sentencepiece model"):
        load(path)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_vocabulary_the_text_does_not_yield_names_both_sizes(config: TokenizerConfig) -> None:
    text = "hello world, hello you\n" * 3
    with pytest.raises(ConfigError) as caught:
        train([text], config, 5000)
    told = str(caught.value)
    assert told.startswith("model.vocab_size = 5000, but the corpus yields only ")
    wanted = int(told.rsplit("=", 1)[1])
    assert train([text], config, wanted).vocab_size == wanted

    with pytest.raises(ConfigError) as caught:
        train([text], config, 100)
    told = str(caught.value)
    assert told.startswith("model.vocab_size = 100, but bytes, special tokens and the corpus's characters are 2")
    assert train([text], config, int(told.split("set model.vocab_size to ")[1].split()[0]))


def test_blank_text_cannot_train(library: list[str]) -> None:
    with pytest.raises(DataError, match="nothing but blank lines"):
        train(["\n\n", ""], TokenizerConfig(), VOCAB)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800b")


def test_words_are_runs_of_letters_with_the_space_before_them(tokenizer: Tokenizer) -> None:
    text = "def f(self, größe_2):\n\treturn  self.größe_2 + 1024;x\n"
    ids = tokenizer.encode(text)
    begins_N, follows_N = tokenizer.word_starts[ids].T
    words = [b""]
    for number, i in enumerate(ids.tolist()):
        if number and (begins_N[number] or follows_N[number - 1]):
            words.append(b"")
        words[-1] += tokenizer.piece_texts[i]
    told = [word.decode() for word in words]
    assert "".join(told) == text
    assert [word.strip() for word in told if word.strip("_ ").isalnum() or "_" in word] == [
        *("def", "f", "self", "größe_2", "return", "self", "größe_2", "1024", "x")
    ]
    assert tokenizer.word_starts[list(tokenizer.control_ids)].all()
