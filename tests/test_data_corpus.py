"""What documents a source gives, what is left out, and what is held out."""

import gzip
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_jax.config import Config
from llm_jax.data import corpus as corpora
from llm_jax.data.config import DataConfig, FilesSource, StdlibSource
from llm_jax.data.corpus import Document, Skipped, open_corpus
from llm_jax.data.errors import DataError
from llm_jax.data.splits import DROPPED, SPLITS, Shingles, assign, documents_of, leaked_share, make_plan
from tests import data_texts


def read(*paths: Path | str, text_field: str = "text") -> list[Document | Skipped]:
    return list(open_corpus(FilesSource(paths=tuple(map(str, paths)), text_field=text_field)).read())


def texts(found: list[Document | Skipped]) -> dict[str, str]:
    return {d.key: d.text for d in found if isinstance(d, Document)}


def skips(found: list[Document | Skipped]) -> dict[str, str]:
    return {d.key: d.reason for d in found if isinstance(d, Skipped)}


def ignore(_: int) -> None:
    pass


def test_a_file_is_a_document_byte_for_byte(tmp_path: Path) -> None:
    contents = {
        "crlf.txt": b"one\r\ntwo\r\n",
        "nul.md": b"a\0b",
        "bom.txt": b"\xef\xbb\xbfhello",
        "no_end.py": b"x = 1",
        "sub/folder/spaces.txt": b"  \n\t ",
        "specials.txt": "<s><mask>▁".encode(),
    }
    for name, raw in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "ignored.bin").write_bytes(b"no text")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "hidden.py").write_text("pass")
    found = read(tmp_path)
    assert {key: text.encode() for key, text in texts(found).items()} == contents
    assert not skips(found)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "good.txt").write_text("good")
    found = read(tmp_path)
    assert texts(found) == {"good.txt": "good"}
    assert skips(found) == {"empty.txt": "empty", "latin.txt": "invalid UTF-8"}
    plan = make_plan(found, DataConfig(), ignore)
    assert plan.skipped == {"empty": 1, "invalid UTF-8": 1}
    assert plan.named_skips == ["latin.txt: invalid UTF-8"]


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    lines = [
        json.dumps({"body": "one\ntwo ▁", "id": 1}),
        "",
        json.dumps({"body": ""}),
        '{"body": "half a pair: \\ud800"}',
        json.dumps({"body": "trois: é"}, ensure_ascii=False),
    ]
    raw = "\n".join(lines).encode() + b'\n{"body": "\xff"}\n'
    (tmp_path / "a.jsonl").write_bytes(raw)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(raw)
    found = read(tmp_path, text_field="body")
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert texts(found)[f"{name}:000000001"] == "one\ntwo ▁"
        assert texts(found)[f"{name}:000000005"] == "trois: é"
    assert sorted(skips(found).values()) == ["empty"] * 4 + ["invalid UTF-8"] * 4


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not json}", "bad.jsonl:2: not JSON"),
        (
            '{"txt": "a", "id": 3}',
            "bad.jsonl:2: no text in field 'text' (there is: txt, id); set data.source.text_field",
        ),
        ('{"text": 3}', "bad.jsonl:2: no text in field 'text' (there is: text); set data.source.text_field"),
        ("[1]", "bad.jsonl:2: no text in field 'text' (there is: list); set data.source.text_field"),
    ],
)
def test_bad_jsonl_is_one_line_with_its_place(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_gzip_is_an_error_not_a_short_corpus(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps({"text": str(i)}) for i in range(9999)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: unreadable after line \d+"):
        read(tmp_path)


def test_paths_are_files_folders_and_globs_once_each(tmp_path: Path) -> None:
    for name in ("a.txt", "b.rst", "sub/c.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert set(texts(read(tmp_path))) == {"a.txt", "sub/c.txt", "odd[1].txt"}
    assert set(texts(read(tmp_path / "*.rst"))) == {"b.rst"}
    assert set(texts(read(tmp_path / "**/*.txt", tmp_path, tmp_path / "b.rst"))) == {
        *("a.txt", "b.rst", "sub/c.txt", "odd[1].txt")
    }
    assert set(texts(read(tmp_path / "odd[1].txt"))) == {"odd[1].txt"}
    for path, told in (("none.txt", "no such file"), ("*.none", "no file matches"), ("empty", "no .txt .md .py")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=told):
            read(tmp_path / path)


def test_the_same_files_elsewhere_are_the_same_documents(tmp_path: Path) -> None:
    one, other = (read(data_texts.write_files(tmp_path / name)) for name in ("one", "deep/er/other"))
    assert one == other
    assert [d.key for d in one] != sorted(d.key for d in one), "neighbours in a folder should not be neighbours in rows"


def test_version_follows_the_files(tmp_path: Path) -> None:
    folder = data_texts.write_files(tmp_path / "texts", n=3)
    source = FilesSource(paths=(str(folder),))
    before = open_corpus(source).version
    assert open_corpus(source).version == before
    text = folder / "text001.txt"
    text.write_text(text.read_text()[::-1])
    assert open_corpus(source).version != before, "of the same size, and yet another"


@pytest.mark.parametrize("line_end", ["\n", ""])
def test_long_files_become_parts_and_nothing_is_lost(
    line_end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "MAX_DOCUMENT_BYTES", 1000)
    rng = random.Random(0)
    text = "".join("".join(rng.choices("abé日🎉 ", k=37)) + line_end for _ in range(300))
    (tmp_path / "long.txt").write_bytes(text.encode())
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    for key in ("long.txt", "long.jsonl:000000001"):
        parts = sorted((d.key, d.text) for d in read(tmp_path) if isinstance(d, Document) and d.key.startswith(key))
        assert len(parts) > 10
        assert "".join(part for _, part in parts) == text
        assert max(len(part.encode()) for _, part in parts) <= 1000
        assert not line_end or all(part.endswith("\n") for _, part in parts)


def test_the_standard_library_without_its_tests() -> None:
    found = texts(list(open_corpus(StdlibSource()).read()))
    assert {"json/decoder.py", "os.py", "asyncio/events.py"} <= set(found)
    left_out = ("test/", "encodings/", "site-packages/", "_sysconfigdata")
    assert not [key for key in found if key.startswith(left_out) or "/test/" in key or "/tests/" in key]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert found["os.py"] == (root / "os.py").read_text()
    assert 6e6 < sum(map(len, found.values())) < 20e6


def documents(n: int, size: Callable[[int], int], group: Callable[[int], str] = str) -> list[Document | Skipped]:
    return [Document(f"{i:05}", group(i), data_texts.sentences(i, size(i))) for i in range(n)]


def sizes(plan_documents: list[Document | Skipped], config: Config | None = None) -> dict[str, float]:
    """The share of each split."""
    assert config is None or isinstance(config, DataConfig)
    plan = make_plan(plan_documents, config or DataConfig(), ignore)
    parts = {split: sum(len(d.text) for d in documents_of(split, plan_documents, plan)) for split in SPLITS}
    return {split: part / sum(parts.values()) for split, part in parts.items()}


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_kept_by_bytes_and_groups_stay_together(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [int(rng.lognormvariate(2, 1)) + 1 for _ in range(400)]
    found = documents(400, lambda i: lengths[i], lambda i: f"{seed}/{i % 150}")
    config = DataConfig(validation_share=0.1, test_share=0.2)
    shares = sizes(found, config)
    assert 0.08 < shares["validation"] < 0.12
    assert 0.17 < shares["test"] < 0.23
    plan = make_plan(found, config, ignore)
    groups = [{d.group for d in documents_of(split, found, plan)} for split in SPLITS]
    assert all(groups)
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


def test_a_group_larger_than_its_share_is_trained_on() -> None:
    for giant in range(30):
        shares = sizes(documents(30, lambda i: 100 if i == giant else 5))  # noqa: B023
        assert shares["train"] > 0.85, "whichever group is the large one"


def test_splits_cover_everything_once() -> None:
    found = documents(100, lambda i: 5)
    plan = make_plan(found, DataConfig(), ignore)
    together = [d for split in SPLITS for d in documents_of(split, found, plan)]
    assert sorted(together, key=lambda d: d.key) == found


def test_splits_follow_names_not_order() -> None:
    found = documents(100, lambda i: 5)
    one, other = (
        {d.key for d in documents_of("test", f, make_plan(f, DataConfig(), ignore))} for f in (found, found[::-1])
    )
    assert one == other


def test_of_one_document_the_end_is_held_out() -> None:
    found = documents(1, lambda i: 1000)
    plan = make_plan(found, DataConfig(), ignore)
    parts = [next(iter(documents_of(split, found, plan))).text for split in SPLITS]
    assert "".join(parts) == found[0].text  # pyright: ignore[reportAttributeAccessIssue]
    assert all(part.endswith("\n") for part in parts)
    assert 0.045 < len(parts[1]) / sum(map(len, parts)) < 0.055 and 0.045 < len(parts[2]) / sum(map(len, parts)) < 0.055


def test_nothing_is_held_out_where_nothing_is_wanted() -> None:
    for n in (1, 50):
        assert sizes(documents(n, lambda i: 100), DataConfig(validation_share=0, test_share=0))["train"] == 1
        shares = sizes(documents(n, lambda i: 100), DataConfig(validation_share=0, test_share=0.1))
        assert shares["validation"] == 0 < shares["test"]


def test_assignment_is_the_same_everywhere() -> None:
    """Another version must not move text from held-out to training."""
    group_N = np.arange(40, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bytes_N = 50 + np.arange(40) * 37 % 50
    split_N, cut = assign(group_N, bytes_N, 0.1, 0.1)
    assert cut is None
    assert np.flatnonzero(split_N == SPLITS.index("test")).tolist() == [0, 13, 18, 26, 34]
    assert np.flatnonzero(split_N == SPLITS.index("validation")).tolist() == [5, 31, 39]


def test_near_duplicates_are_left_out_before_splitting() -> None:
    original = data_texts.sentences(1, 100)
    lines = original.split("\n")
    reindented = "\n".join(f"    {line}" for line in lines)
    edited = "\n".join(line if i % 25 else "another line" for i, line in enumerate(lines))
    half = "\n".join(lines[:30]) + data_texts.sentences(2, 70)
    names = {"original": original, "copy": original, "reindented": reindented, "edited": edited, "half": half}
    found: list[Document | Skipped] = [Document(name, name, text) for name, text in names.items()]
    plan = make_plan(found, DataConfig(), ignore)
    kept = [name for name, split in zip(names, plan.split_N, strict=True) if split != DROPPED]
    assert kept == ["original", "half"]
    assert plan.skipped == {"near duplicate": 3}
    assert {d.key for split in SPLITS for d in documents_of(split, found, plan)} == {"original", "half"}


def test_short_texts_are_duplicates_only_when_equal() -> None:
    shingles = Shingles()
    assert [shingles.seen(text) for text in ("a", "b", "a", "a\nb", "b\na", "a\n\n b")] == [
        *(False, False, True, False, False, True)
    ]


def test_memory_for_duplicates_is_bounded_and_still_finds_them() -> None:
    shingles = Shingles(limit=1000)
    texts_seen = [data_texts.sentences(i, 300) for i in range(30)]
    assert not any(shingles.seen(text) for text in texts_seen)
    assert len(shingles.hashes) <= 1000
    assert sum(shingles.seen(text) for text in texts_seen) >= 28


def test_leaked_share_counts_long_lines() -> None:
    long = ["this line is quite long enough", "so is this other line, really", "a third line of good length"]
    train = [f"  {long[0]}\nshort", long[1]]
    test = [f"{long[0]}\n{long[2]}\nshort\n", f"\t{long[0]}  \n{long[2]}"]
    assert leaked_share(train, test) == 0.5
    assert leaked_share(train, ["short"]) == 0


def test_no_usable_text_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"data\.source \(files\) has no usable text: 1 \w.*, 1 \w.*"):
        make_plan(read(tmp_path), data_texts.config(tmp_path, into=tmp_path), ignore)


def test_a_source_that_changes_while_it_is_read_is_an_error() -> None:
    found = documents(20, lambda i: 5)
    plan = make_plan(found, DataConfig(), ignore)
    longer = [*found, Document("new", "new", "text")]
    with pytest.raises(DataError, match="grew while it was read"):
        list(documents_of("train", longer, plan))
    changed = [Document(d.key, d.group, d.text + "!") for d in found if isinstance(d, Document)]
    with pytest.raises(DataError, match="changed while it was read"):
        list(documents_of("train", changed, plan))
