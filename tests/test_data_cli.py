"""`llm-jax data prepare` and `llm-jax data show`, as typed."""

import os
import pty
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_jax import exit_codes
from llm_jax.config import ConfigError
from llm_jax.data import progress
from llm_jax.data.cli import main
from llm_jax.data.config import BOS_ID, PAD_ID
from llm_jax.data.errors import DataError
from llm_jax.data.loader import open_rows
from llm_jax.data.prepare import open_prepared
from llm_jax.data.show import show_row
from llm_jax.run import from_command_line
from tests import data_texts
from tests.conftest import ROOT

TINY = str(ROOT / "configs" / "tiny_causal.py")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = data_texts.write_files(tmp_path_factory.mktemp("texts"))
    return [
        TINY,
        f"data.dir={tmp_path_factory.mktemp('data')}",
        "data.source.kind=files",
        f"data.source.paths={folder}",
        "data.seq_len=32",
        "model.vocab_size=400",
        "train.batch_rows=8",
    ]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_prepare_then_look(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *arguments]) == exit_codes.DONE
    first = lines(capsys)
    assert [line.split()[0] for line in first[:4]] == ["text", "tokenizer", "rows", "prepared"]
    assert "40 documents (train " in first[0]

    begin = time.monotonic()
    assert main(["prepare", *arguments]) == exit_codes.DONE
    assert time.monotonic() - begin < 2
    again = lines(capsys)
    assert again[0] == "already prepared"
    assert again[-1] == first[-1] and "fingerprint" in again[-1]

    assert main(["show", *arguments, "--step", "7", "--rows", "3"]) == exit_codes.DONE
    shown = lines(capsys)
    assert shown[0].startswith("batch 7 of 8 rows; an epoch is ")
    assert sum(line.startswith("=== row ") for line in shown) == 3
    run = from_command_line(arguments[0], arguments[1:])
    made = open_prepared(run.data, run.tokenizer, run.model.vocab_size, run.seed)
    rows_NU = open_rows(made, "train", run.seed)[np.arange(56, 59)]
    for row_U in rows_NU:
        assert show_row(row_U, made.tokenizer) in "\n".join(shown)


def test_show_says_what_to_do_first(arguments: list[str]) -> None:
    with pytest.raises(DataError, match="llm-jax data prepare") as caught:
        main(["show", *arguments, "data.test_share=0.2"])
    assert caught.value.exit_code == exit_codes.DATA


@pytest.mark.parametrize("argv", [[], ["prepair", TINY], ["show", TINY, "--step=-1"], ["show", TINY, "--rows", "0"]])
def test_mistakes_are_one_line(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="llm-jax data"):
        main(argv)


def test_a_row_is_shown_segment_by_segment(arguments: list[str]) -> None:
    main(["prepare", *arguments])
    run = from_command_line(arguments[0], arguments[1:])
    tokenizer = open_prepared(run.data, run.tokenizer, run.model.vocab_size, run.seed).tokenizer
    one, two = tokenizer.encode("the end\nof one").tolist(), tokenizer.encode("all of two").tolist()
    row_U = np.array([*one, BOS_ID, *two, BOS_ID, *one, PAD_ID, PAD_ID], np.int32)
    a, b = len(one), len(one) + 1 + len(two)
    assert show_row(row_U, tokenizer).splitlines() == [
        f"--- segment 0, tokens 0 to {a - 1}: a document goes on",
        *("the end", "of one"),
        f"--- segment 1, tokens {a} to {b - 1}: a document begins",
        "all of two",
        f"--- segment 2, tokens {b} to {b + len(one)}: a document begins",
        *("the end", "of one"),
        "--- 2 tokens of padding",
    ]


def test_progress_is_plain_lines_in_a_pipe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress.progress("reading", 200) as advance:
        for _ in range(4):
            advance(50)
    assert capfd.readouterr().err.splitlines() == [f"reading: {share}%" for share in (25, 50, 75, 100)]


def test_progress_is_a_bar_on_a_terminal() -> None:
    script = (
        "import time\nfrom llm_jax.data.progress import progress\n"
        "with progress('reading', 4) as advance:\n    for _ in range(4):\n        advance(1); time.sleep(0.1)\n"
    )
    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", script], env=environment, stdout=follower, stderr=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "reading" in shown and "━" in shown and "%" in shown
