"""What training writes down survives a death and a resume, and reads well."""

import json
import os
import pty
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  generated at import

from llm_jax.train import metrics
from llm_jax.train.config import LoggingConfig
from llm_jax.train.metrics import drop_after, format_line, format_validation, open_log, short, to_json

QUIET = LoggingConfig(every=1000, tensorboard=False)


def line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3.4121 + 1 / step,
        "grad_norm": 0.71,
        "lr": 9.8e-4,
        "tokens": 4096.0,
        "tokens_per_s": 12_300.0,
        "mfu": None,
        "data_wait": 0.0,
        "checkpoint_stall": 0.0,
        "batch_hash": 4_294_967_295,
        "finite": True,
        "skipped": 0,
        **changes,
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read as standard JSON: Python's own NaN and Infinity would be a failure."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines()]


def write(run_dir: Path, steps: range, restored_step: int = 0, logging: LoggingConfig = QUIET) -> None:
    with open_log(run_dir, restored_step, 1000, logging, writes=True) as log:
        for step in steps:
            log.write(line(step))


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, 10, QUIET, writes=True) as log:
        log.write(line(1))
        assert lines_of(tmp_path / "metrics.jsonl")[0]["batch_hash"] == 4_294_967_295
        log.write_validation({"step": 1, "loss": 3.5})
        assert lines_of(tmp_path / "validation.jsonl")[0]["loss"] == 3.5
        log.sync()


def test_a_float32_comes_back_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    with open_log(tmp_path, 0, 100, QUIET, writes=True) as log:
        for step, value in enumerate(values, 1):
            log.write(line(step, loss=value.item()))
    read = np.asarray([row["loss"] for row in lines_of(tmp_path / "metrics.jsonl")], np.float32)
    assert read.tobytes() == values.tobytes()


def test_what_is_not_finite_is_null_and_said_to_be(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, 10, QUIET, writes=True) as log:
        log.write(line(1, loss=float("nan"), grad_norm=float("inf")))
        log.write(line(2))
    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["grad_norm"], first["finite"]) == (None, None, False)
    assert second["finite"] is True
    assert "finite" not in json.loads(to_json({"mfu": None}))


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 3.')  # the process died here
    write(tmp_path, range(5, 10), restored_step=4)
    assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_line_is_not_glued_to_a_torn_one(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3')
    write(tmp_path, range(5, 6), restored_step=4)
    assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_validation_goes_on_where_the_restored_step_left_it(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, 100, QUIET, writes=True) as log:
        assert log.validated == -1
        for step in (0, 20, 40, 60):
            log.write_validation({"step": step, "loss": 3.0})
    with open_log(tmp_path, 40, 100, QUIET, writes=True) as log:
        assert log.validated == 40
    assert [row["step"] for row in lines_of(tmp_path / "validation.jsonl")] == [0, 20, 40]


def test_dropping_keeps_whole_lines_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\0\0\0\0\n[3]\n{"loss": 2}\n{"step": "2"}\n\xff\n{"step": 2}\n{"step": 3}\n{"step": 1}'
    )
    assert drop_after(path, 2) == 2
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert drop_after(path, 0) == -1
    assert path.read_bytes() == b""
    assert drop_after(tmp_path / "none.jsonl", 2) == -1
    assert os.listdir(tmp_path) == ["lines.jsonl"]


def test_a_death_while_dropping_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    before = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(before)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            drop_after(path, 1)
    assert path.read_bytes() == before
    assert drop_after(path, 1) == 1
    assert os.listdir(tmp_path) == ["lines.jsonl"]


def test_the_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    with open_log(tmp_path, 2, 4, LoggingConfig(every=1), writes=False) as log:
        log.write(line(3))
        log.write_validation({"step": 3, "loss": 3.0})
        log.say("hello")
        log.sync()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "validation.jsonl"]
    assert log.validated == -1
    assert capsys.readouterr().out == ""


def test_a_pipe_gets_plain_lines_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, 10, 120, LoggingConfig(every=50, tensorboard=False), writes=True) as log:
        for step in range(11, 121):
            log.write(line(step, loss=float("nan") if step == 77 else 3.4121, finite=step != 77))
        log.write_validation({"step": 120, "loss": 3.0, "bits_per_byte": 1.234})
        log.say("[bold] is not markup")
    assert capsys.readouterr().out.splitlines() == [
        "step  11/120  loss 3.4121  lr 9.8e-04  grad 0.71  12.3k tok/s  wait 0%",
        "step  50/120  loss 3.4121  lr 9.8e-04  grad 0.71  12.3k tok/s  wait 0%",
        "step  77/120  loss nan  lr 9.8e-04  grad 0.71  12.3k tok/s  wait 0%  not finite, skipped",
        "step 100/120  loss 3.4121  lr 9.8e-04  grad 0.71  12.3k tok/s  wait 0%",
        "step 120/120  loss 3.4121  lr 9.8e-04  grad 0.71  12.3k tok/s  wait 0%",
        "held-out text after step 120:  loss 3.0000  1.234 bits per byte",
        "[bold] is not markup",
    ]


def test_a_printed_speed_is_that_of_all_updates_since_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, 0, 4, LoggingConfig(every=2, tensorboard=False), writes=True) as log:
        log.write(line(1, tokens_per_s=None, data_wait=None, checkpoint_stall=None))
        log.write(line(2, tokens_per_s=1000.0))
        log.write(line(3, tokens_per_s=1000.0, data_wait=0.5))
        log.write(line(4, tokens_per_s=4000.0))
    first, second, fourth = capsys.readouterr().out.splitlines()
    assert "tok/s" not in first and "wait" not in first
    assert "1.00k tok/s  wait 0%" in second
    # 8192 tokens in 4.096 + 1.024 seconds, of which 2.048 were spent waiting
    assert "1.60k tok/s  wait 40%" in fourth


def test_a_line_says_what_is_unusual_and_only_then() -> None:
    shown = format_line(line(120, loss=3.0, mfu=0.412, data_wait=0.031, checkpoint_stall=0.25, skipped=2), 2000)
    assert shown == (
        "step  120/2000  loss 3.0000  lr 9.8e-04  grad 0.71  12.3k tok/s  mfu 41%  wait 3%  save 25%  2 skipped so far"
    )
    assert format_line({"step": 1, "loss": None}, 10) == "step  1/10  loss nan"
    routed = {"step": 1, "loss": 2.0, "load_max_over_mean": 1.234, "dropped": 0.02}
    assert format_line(routed, 9) == "step 1/9  loss 2.0000  load 1.23  dropped 2.0%"
    assert format_validation({"step": 7, "loss": None, "perplexity": 12.345, "accuracy": 0.5}) == (
        "held-out text after step 7:  perplexity 12.35  accuracy 50.0%"
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.5, "0.5"),
        (987.4, "987"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (1.5e9, "1.50B"),
        (0, "0"),
    ],
)
def test_short_numbers_have_three_digits(number: float, text: str) -> None:
    assert short(number) == text


def events_of(directory: Path) -> Iterator[Event]:
    """Every event of the TensorBoard files, which are TFRecords: length, checksum, bytes, checksum."""
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_tensorboard_gets_every_update_and_forgets_what_a_resume_makes_anew(tmp_path: Path) -> None:
    logging = LoggingConfig(every=1000)
    write(tmp_path, range(1, 6), logging=logging)
    with open_log(tmp_path, 3, 1000, logging, writes=True) as log:
        log.write(line(4, loss=2.5))
        log.write_validation({"step": 4, "loss": 3.0, "bits_per_byte": 1.5})
    events = list(events_of(tmp_path / "tensorboard"))
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [1, 4]
    values = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
    assert values[4, "train/loss"] == 2.5
    assert values[4, "validation/bits_per_byte"] == 1.5
    assert values[5, "train/lr"] == pytest.approx(9.8e-4)
    assert not any("batch_hash" in tag or "mfu" in tag for _, tag in values)


CHILD = """
import sys
from llm_jax.train.config import LoggingConfig
from llm_jax.train.metrics import open_log

with open_log(sys.argv[1], 0, 60, LoggingConfig(every=20, tensorboard=False), writes=True) as log:
    for step in range(1, 61):
        log.write({"step": step, "loss": 3.25, "tokens": 10.0, "tokens_per_s": 12300.0})
    print("from elsewhere")
print(sorted({"jax", "tensorboardX", "rich"} & set(sys.modules)))
"""


def test_a_terminal_shows_a_bar_below_the_lines(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # Linux's way of saying that the other side is closed
        pass
    finally:
        os.close(ours)
    assert child.wait(60) == 0, shown
    text = shown.decode()
    for printed in ("step  1/60  loss 3.2500  12.3k tok/s", "step 20/60", "step 60/60", "from elsewhere"):
        assert printed in text
    assert "━" in text and "60/60" in text.split("step 60/60")[-1]
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden, and shown again"


def test_in_a_pipe_nothing_is_imported_that_is_not_used(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "━" not in done.stdout and "\x1b" not in done.stdout


def test_a_log_is_closed_by_its_context(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, 10, QUIET, writes=True) as log:
        pass
    with pytest.raises(ValueError, match="closed"):
        log.write(line(1))
