"""The report: one file that needs nothing else, true to the run's lines, whatever they and its texts hold."""

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from llm_jax.config import ConfigError, override, to_json
from llm_jax.exit_codes import CHECKPOINT
from llm_jax.model.config import ModelConfig
from llm_jax.report import cli, words
from llm_jax.report.axes import tick_text, ticks, value_text
from llm_jax.report.curves import MOST_POINTS, charts, smoothed, thinned
from llm_jax.report.html import data
from llm_jax.report.plot import SIDE, path
from llm_jax.report.record import read
from llm_jax.run import Run
from llm_jax.train import flops

ROOT = Path(__file__).parents[1]
STEPS = 120
EVIL = "</script></pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</title>\x00\x1b\ud800\u202e"
ENVIRONMENT = {
    "started": "2026-11-22T03:20:00+00:00",
    "restored_step": 0,
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "changed_since_commit": True,
    "versions": {"python": "3.12.1", "jax": "0.12.0"},
    "devices": {"kind": "TPU v4", "platform": "tpu", "count": 8},
    "flags": {"XLA_FLAGS": "--xla_flag=1"},
    "backends": {"attention": "chunked"},
}


def update(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2 + 6 * math.exp(-step / 30) + 0.1 * math.sin(step),
        "grad_norm": 1 / step,
        "lr": 1e-3 * step / STEPS,
        "tokens": 4096.0,
        "tokens_per_s": None if step == 1 else 8000.0 + step,
        "mfu": None,
        "data_wait": 0.0,
        "finite": True,
        "time": 1_795_318_000.0 + 0.5 * step,
        **changes,
    }


def scores(step: int, split: str, bits: float, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "split": split,
        "loss": 2.5,
        "perplexity": 12.18,
        "bits_per_byte": bits,
        "accuracy": 0.4431,
        "tokens": 181_204,
        "bytes": 551_320,
        "zlib_bits_per_byte": 2.049,
        "lzma_bits_per_byte": 1.881,
        "seen_long_lines": 0.041,
        "sample": {"prompt": "def ", "text": "answer():\n    return 42 < 43 & True\n"},
        **changes,
    }


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(directory: Path, *overrides: str, **parts: list[dict[str, Any]]) -> Path:
    """A run directory as training and evaluation leave it; parts replace the lines of its files."""
    directory.mkdir(parents=True)
    run = override(Run(), [f"name={directory.name}", f"train.steps={STEPS}", "model.d_model=64", *overrides])
    (directory / "config.json").write_text(to_json(run))
    write_lines(directory / "metrics.jsonl", parts.get("metrics", [update(step) for step in range(1, STEPS + 1)]))
    looks = [{"step": step, "loss": 2.6, "bits_per_byte": 4 - step / 60, "accuracy": 0.4} for step in (40, 80, 120)]
    write_lines(directory / "validation.jsonl", parts.get("validation", looks))
    write_lines(directory / "eval.jsonl", parts.get("eval", [scores(STEPS, "test", 1.9)]))
    (directory / "environment.json").write_text(json.dumps({"attempts": parts.get("attempts", [ENVIRONMENT])}))
    return directory


class Page(HTMLParser):
    """What a browser makes of the markup: elements with their attributes, and their text by class or tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            key = (dict(attrs).get("class") or tag).split()[0]
            self.open.append(key)
            self.texts.setdefault(key, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words += data
        for key in self.open:
            self.texts[key][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def report(*directories: Path, options: tuple[str, ...] = ()) -> str:
    """The text of the report on these runs, where the verb puts it by default."""
    assert cli.main([*map(str, directories), *options]) == 0
    first = directories[0]
    return (first / "report.html" if len(directories) == 1 else first.parent / "comparison.html").read_text()


def test_a_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run"))
    page = Page(text)
    assert page.open == [], "every element is closed"
    assert not {"link", "img", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert not any({"src", "srcset", "action"} & attributes.keys() for _, attributes in page.elements)
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links and all(link and ":" not in link and not link.startswith("/") for link in links)
    assert "url(" not in text and "@import" not in text


def test_only_its_own_script_may_run(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run"))
    policy = next(a["content"] for _, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_what_texts_say_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    harmless = Page(report(make_run(tmp_path / "harmless")))
    row = scores(STEPS, "test", 1.9, sample={"prompt": EVIL, "text": EVIL})
    flags = {**ENVIRONMENT, "flags": {EVIL: EVIL}}
    directory = make_run(tmp_path / "evil", eval=[row], attempts=[flags])
    tree = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**tree, "name": EVIL}))
    page = Page(report(directory))
    assert page.open == []
    assert page.count("script") == harmless.count("script") and page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    shown = EVIL.replace("\x00", "\u2400").replace("\x1b", "\u241b").replace("\ud800", "?").replace("\u202e", "\ufffd")
    assert page.texts["sample"] == [shown + shown]
    assert page.texts["title"] == [shown] and page.texts["h1"] == [shown]
    assert f"{shown} {shown}" in page.words


def test_data_for_the_script_cannot_end_it() -> None:
    text = ElementTree.tostring(data([EVIL, 1.5]), encoding="unicode", method="html")
    page = Page(text)
    assert page.open == [] and page.count("script") == 1
    assert json.loads(page.texts["script"][0]) == [EVIL, 1.5]


def test_figures_are_those_of_the_run(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    page = Page(report(directory))
    assert page.texts["big"] == ["1.90bits per byte on test text"]
    tiles = {label: value for value, label in words.headline(read(directory))}
    assert tiles == {
        "test loss, nats a token": "2.500",
        "perplexity": "12.18",
        "next tokens guessed right": "44.3%",
        "parameters": words.short(flops.parameters(ModelConfig(d_model=64))),
        "tokens trained on": words.short(4096 * STEPS),
        "tokens a second, median": "8.06k",
        "training time": "1 min",
        "updates": "120",
    }
    assert page.texts["tile"] == [value + label for label, value in tiles.items()]
    assert "That is fewer than zlib -9 on the same bytes." in page.words
    assert "4.1% of the test text's long lines also occur" in page.words
    assert "0123456789ab, with changes" in page.words and "8 x TPU v4" in page.words
    assert "Finished on 22 November 2026." in page.words


def test_a_curve_is_drawn_where_its_values_lie(tmp_path: Path) -> None:
    (loss,) = [chart for chart in charts([read(make_run(tmp_path / "run"))]) if chart.key == "loss"]
    text = (tmp_path / "run" / "report.html").read_text() if report(tmp_path / "run") else ""
    faint = next(a["d"] for tag, a in Page(text).elements if tag == "path" and a.get("class") == "faint c0")
    assert faint is not None
    points = np.asarray([point.split() for point in faint.lstrip("M").split("L")], float)
    x = loss.x_range[0] + points[:, 0] / SIDE * (loss.x_range[1] - loss.x_range[0])
    y = loss.y_range[0] + (1 - points[:, 1] / SIDE) * (loss.y_range[1] - loss.y_range[0])
    np.testing.assert_allclose(x, np.arange(1, STEPS + 1), atol=0.1)
    np.testing.assert_allclose(y, [update(step)["loss"] for step in range(1, STEPS + 1)], atol=0.01)
    assert loss.y_range[0] < y.min() < y.max() < loss.y_range[1]


def test_the_data_for_reading_off_are_the_lines_own(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run"))
    drawn = [json.loads(part.split("</script>")[0]) for part in text.split('<script type="application/json">')[1:]]
    loss, bits, rate, gradient, speed = drawn
    assert loss["series"][0]["y"] == pytest.approx([update(step)["loss"] for step in range(1, STEPS + 1)], rel=1e-5)
    assert bits["series"][0] == {"x": [40, 80, 120], "y": pytest.approx([3.33333, 2.66667, 2])}
    assert bits["series"][1] == {"x": [STEPS], "y": [1.9]}
    assert rate["series"][0]["y"][-1] == 1e-3
    assert gradient["scale"] == "log" and speed["series"][0]["y"][0] is None
    assert ["zlib 2.049", "lzma 1.881"] == Page(text).texts["level"]


def test_a_run_under_way_is_told_as_far_as_it_is(tmp_path: Path) -> None:
    directory = make_run(
        tmp_path / "run", metrics=[update(step) for step in range(1, 31)], validation=[], eval=[], attempts=[]
    )
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "loss": 2.')
    page = Page(report(directory))
    assert "Not finished: step 30 of 120" in page.words
    assert "training loss, nats a token" in page.words
    assert "No figures on held-out text yet: llm-jax eval" in page.words and "Not evaluated yet" in page.words
    assert page.texts["h3"][:4] == ["Loss", "Learning rate", "Gradient norm", "Tokens per second"]


def test_held_out_figures_stand_in_until_there_are_test_figures(tmp_path: Path) -> None:
    page = Page(report(make_run(tmp_path / "run", eval=[])))
    assert page.texts["big"] == ["2.00bits per byte on held-out text"]
    assert "bar" not in page.texts


@pytest.mark.parametrize(
    "files",
    [
        {"metrics.jsonl": ""},
        {"metrics.jsonl": "not json\n[1]\n3\n{}\n"},
        {"config.json": "{}"},
        {"config.json": "[]", "environment.json": "null", "eval.jsonl": '{"step": "x"}\n'},
        {"metrics.jsonl": '{"step": 1, "loss": NaN, "grad_norm": Infinity, "lr": -Infinity, "finite": false}\n'},
        {"metrics.jsonl": '{"step": 1}\n', "validation.jsonl": '{"step": 1}\n', "eval.jsonl": '{"step": 1}\n'},
        {"metrics.jsonl": '{"step": 5, "loss": 0, "grad_norm": 0, "lr": 0, "tokens_per_s": 0, "time": 1e300}\n'},
        {"metrics.jsonl": f'{{"step": 1, "loss": 3e38, "tokens": {"9" * 400}}}\n{{"step": 2, "loss": -3e38}}\n'},
        {"config.json": '{"model": 3, "train": {"steps": "many"}, "data": {"source": null}}'},
        {
            "metrics.jsonl": '{"step": 1, "loss": 2}\n',
            "eval.jsonl": '{"step": 1, "split": "test", "suite": {"kinds": {"a": 3, "b": {"accuracy": 4, "n": "x"}}, '
            '"all": [], "left_out": 5}, "tasks": {"t": {"metrics": [], "by": {"g": 1, "h": {}}}, "u": null}}\n'
            '{"step": 2, "split": "test", "suite": [], "tasks": 7, "stride": []}\n{"step": 3, "split": "tes',
            "rollbacks.jsonl": '{"to_step": "x"}\n{"time": null, "to_step": 1e999}\n[]\n{"time": 1',
            "best.json": "nonsense",
        },
        {"config.json": '{"name": ["a"]}', "environment.json": '{"attempts": [3, {"devices": 4, "commit": 5}]}'},
    ],
)
def test_nothing_that_a_directory_holds_breaks_the_report(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    page = Page(report(tmp_path))
    assert page.open == []
    assert page.count("h1") == 1
    assert "nan" not in page.words.lower() and "inf" not in page.words.replace("information", "")


def test_an_older_versions_config_is_shown_as_it_is(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    tree = json.loads((directory / "config.json").read_text())
    tree["model"] = {**tree["model"], "retired_field": {"deep": 17}}
    (directory / "config.json").write_text(json.dumps(tree))
    assert words.Field("model.retired_field", "deep", "17", False) in words.fields(tree)
    assert "parameters" not in Page(report(directory)).texts["tile"]


def test_a_config_marks_what_is_not_the_default(tmp_path: Path) -> None:
    page = Page(report(make_run(tmp_path / "run", "optim.lr=0.004")))
    assert set(page.texts["changed"]) == {"64", "0.004", str(STEPS)}


def test_skipped_updates_are_counted_and_marked(tmp_path: Path) -> None:
    lines = [
        update(step, **({"loss": None, "grad_norm": None, "finite": False} if step in (7, 8) else {}))
        for step in range(1, 121)
    ]
    directory = make_run(tmp_path / "run", metrics=lines)
    (loss, *_) = charts([read(directory)])
    assert list(loss.skipped) == [7, 8]
    for one in loss.series[:2]:  # every update, and their mean, which would hide a failure
        assert list(one.x[np.isnan(one.y)]) == [7, 8]
    assert "2updates skipped, not finite" in Page(report(directory)).texts["tile"]


def test_time_between_attempts_is_not_training_time(tmp_path: Path) -> None:
    lines = [update(step) for step in range(1, 61)]
    lines += [update(step, time=1_795_318_000.0 + 90_000 + 0.5 * step) for step in range(61, 121)]
    lines[60]["tokens_per_s"] = None  # an attempt's first update
    attempts = [ENVIRONMENT, {**ENVIRONMENT, "restored_step": 60}]
    directory = make_run(tmp_path / "run", metrics=lines, attempts=attempts)
    assert read(directory).seconds == pytest.approx(118 * 0.5)
    assert "it is the work of 2 attempts" in Page(report(directory)).words


def test_of_a_step_recorded_twice_the_later_line_counts(tmp_path: Path) -> None:
    lines = [update(3), update(1), update(2), update(2, loss=5.0)]
    evaluations = [scores(1, "test", 3.0), scores(1, "test", 2.0), {"step": 1, "lm_eval": {"tasks": {}}}]
    record = read(make_run(tmp_path / "run", metrics=lines, eval=evaluations))
    assert list(record.updates["step"]) == [1, 2, 3]
    assert record.updates["loss"][1] == 5.0
    assert [row["bits_per_byte"] for row in record.evaluations] == [2.0]


def test_several_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", "optim.lr=0.004", "model.mlp=gelu", eval=[scores(STEPS, "test", 1.8)])
    text = report(first, second)
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.html'}\n"
    page = Page(text)
    assert page.open == []
    assert page.texts["h1"] == ["2 runs compared"]
    assert page.texts["strong"] == ["1.800"]
    assert words.differences([read(first), read(second)]) == [
        ("model.mlp", ["swiglu", "gelu"]),
        ("optim.lr", ["0.001", "0.004"]),
    ]
    assert page.words.count("long lines also occur") == 1, "the same sentence is not said twice"
    classes = {a.get("class") for tag, a in page.elements if tag == "path"}
    assert {"line c0", "line c1", "dashed c0", "dashed c1"} <= classes
    assert not any(name and "faint" in name for name in classes)
    assert [a["href"] for tag, a in page.elements if tag == "a"] == ["first", "second"]


def masked_run(directory: Path, accuracy: float = 0.31) -> Path:
    nothing = dict.fromkeys(("bits_per_byte", "zlib_bits_per_byte", "lzma_bits_per_byte"))
    filled = [["def ", None], ["f", "f"], ["(", None], ["self", "cls"], [EVIL, EVIL], ["):\n", None]]
    row = scores(STEPS, "test", 0, **nothing, accuracy=accuracy, sample={"filled": filled})
    looks = [{"step": 40, "loss": 3.1, "bits_per_byte": None, "accuracy": 0.2}]
    return make_run(directory, "objective.name=mlm", validation=looks, eval=[row])


def test_a_masked_model_is_told_by_what_it_guesses(tmp_path: Path) -> None:
    directory = masked_run(tmp_path / "run")
    page = Page(report(directory))
    assert page.open == [] and page.count("script") == Page(report(make_run(tmp_path / "other"))).count("script")
    assert page.texts["lead"][0].startswith("A masked language model of ")
    assert page.texts["big"] == ["31.0%of hidden tokens in test text guessed right"]
    assert page.texts["h3"][:2] == ["Loss", "Held-out accuracy"]
    assert "zlib" not in page.words and "bits per byte" not in page.texts["tile"] and "next token" not in page.words
    assert page.texts["sample"][0].startswith("def f(selfcls") and page.texts["sample"][0].endswith("):\n")
    assert page.texts["mark"][:2] == ["f", "self"] and page.texts["del"] == ["cls"]
    (directory / "eval.jsonl").write_text("")
    assert Page(report(directory)).texts["big"] == ["20.0%of hidden tokens in held-out text guessed right"]


def test_masked_models_are_compared_by_accuracy_and_others_stay_beside_them(tmp_path: Path) -> None:
    better, worse, causal = masked_run(tmp_path / "a", 0.4), masked_run(tmp_path / "b", 0.3), make_run(tmp_path / "c")
    page = Page(report(better, worse))
    assert page.texts["strong"] == ["40.0%"] and "Test accuracy" in page.texts["th"] and "zlib -9" not in page.words
    page = Page(report(better, causal))
    assert page.texts["strong"] == ["1.900"] and "Test bits per byte" in page.texts["th"]
    assert "by a hidden token or the next token" in page.words


def figures_of(value: float, **more: Any) -> dict[str, Any]:
    estimate = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"n": 100, "accuracy": estimate, "untrained": {**estimate, "value": 0.5}, "fewer_tokens_wins": 0.5, **more}


SUITE = {
    "kinds": {"missing colon": figures_of(0.93), EVIL: figures_of(0.7)},
    "all": figures_of(0.85, n=200),
    "left_out": {"far bracket": "only 3 pairs"},
}
TASKS = {
    "agreement": {
        "n": 3,
        "metrics": {"accuracy": {"value": 0.6, "low": 0.5, "high": 0.7}, "ece": {"value": 0.1, "low": 0, "high": 0.2}},
        "chance": 0.5,
        "by": {
            "verbs": {"n": 2, "value": 0.5, "low": 0, "high": 1},
            "nouns": {"n": 1, "value": 1, "low": 1, "high": 1},
        },
    }
}


def test_what_a_model_tells_apart_is_in_tables_and_the_best_is_marked(tmp_path: Path) -> None:
    looked = {"suite": SUITE, "tasks": {}, "stride": 16}
    rows = [scores(step, "validation", bits, **looked) for step, bits in ((40, 2.5), (80, 1.7), (120, 1.8))]
    directory = make_run(tmp_path / "run", eval=[*rows, scores(STEPS, "test", 1.9, suite=SUITE, tasks=TASKS)])
    page = Page(report(directory))
    assert page.open == []
    assert {"What it tells apart", "Tasks"} <= set(page.texts["h2"])
    assert page.texts["strong"] == ["0.930 \N{PLUS-MINUS SIGN} 0.100", "0.700 \N{PLUS-MINUS SIGN} 0.100"] + [
        "all together",
        "0.850 \N{PLUS-MINUS SIGN} 0.100",
    ]
    assert "far bracket is left out: only 3 pairs" in page.words
    cells = page.texts["td"]
    assert [cells[cells.index(name) + 1 :][:2] for name in ("accuracy", "ece")] == [
        ["0.600 \N{PLUS-MINUS SIGN} 0.100", "0.500"],
        ["0.100 \N{PLUS-MINUS SIGN} 0.100", ""],
    ]
    assert page.texts["group"] == ["verbs", "nouns"]
    assert "step 80, validation, the best" in page.words and page.words.count(", the best") == 1
    (bits,) = [chart for chart in charts([read(directory)]) if chart.key == "bits_per_byte"]
    assert [one.name for one in bits.series] == ["held out", "validation text", "test text"]
    assert bits.best == (80, 1.7) and list(bits.series[1].y) == [2.5, 1.7, 1.8]
    assert {"best", "best inner"} <= {a.get("class") for tag, a in page.elements if tag == "path"}
    other = make_run(tmp_path / "other", eval=[scores(STEPS, "test", 1.8, suite=SUITE)])
    compared = Page(report(directory, other))
    assert compared.open == [] and "What it tells apart" in compared.texts["h2"] and "Tasks" in compared.texts["h2"]


def test_many_evaluations_are_folded(tmp_path: Path) -> None:
    rows = [scores(step, "validation", 2.0) for step in range(1, 31)]
    page = Page(report(make_run(tmp_path / "run", eval=rows)))
    assert page.open == [] and page.texts["summary"] == ["18 earlier ones"]
    assert page.texts["big"] == ["2.00bits per byte on validation text"]


def test_rollbacks_are_told_and_what_was_left_is_not(tmp_path: Path) -> None:
    rows = [scores(step, "validation", bits, rolled_back=None) for step, bits in ((40, 2.5), (80, 1.0))]
    directory = make_run(tmp_path / "run", eval=[*rows, scores(100, "validation", 1.9, rolled_back=1_795_318_020.5)])
    back = {"rollback": 1, "from_step": 85, "skipped": 10, "to_step": 40, "next_batch": 96, "time": 1_795_318_020.5}
    write_lines(directory / "rollbacks.jsonl", [back])
    page = Page(report(directory))
    assert page.open == [] and "Rollbacks" in page.texts["h2"] and "1times the run went back" in page.texts["tile"]
    assert [row["step"] for row in read(directory).evaluations] == [40, 100]
    assert "step 85" in page.words and "went back to here" in page.words and "rollbacks.jsonl" in page.words
    (loss, bits, *_) = charts([read(directory)])
    assert loss.went_back == [40] and bits.best == (100, 1.9)
    report(directory, options=("--svg", str(tmp_path / "svg")))
    assert "went back to here" in (tmp_path / "svg" / "loss.svg").read_text()
    assert "Rollbacks" not in Page(report(make_run(tmp_path / "calm"))).texts["h2"]


def test_a_page_as_a_picture_needs_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any program of a browser's name will do; one that makes nothing is told, in its own last words."""
    directory, picture, bin_dir = make_run(tmp_path / "run"), tmp_path / "new" / "page.png", tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", str(bin_dir))
    with pytest.raises(ConfigError, match=r"^--screenshot needs a browser on the path: one of chromium"):
        cli.main([str(directory), "--screenshot", str(picture)])
    browser = bin_dir / "chromium"
    browser.write_text("#!/bin/sh\necho no screen >&2\n")
    browser.chmod(0o755)
    with pytest.raises(ConfigError, match="chromium made no picture: no screen"):
        cli.main([str(directory), "--screenshot", str(picture)])
    wanted = 'for a in "$@"; do case $a in --screenshot=*) echo "$@" > "${a#--screenshot=}";; esac; done'
    browser.write_text(f"#!/bin/sh\n{wanted}\n")
    assert cli.main([str(directory), "--screenshot", str(picture)]) == 0
    assert (directory / "report.html").as_uri() in picture.read_text()


def test_a_report_goes_where_it_is_wanted(tmp_path: Path) -> None:
    directory, wanted = make_run(tmp_path / "run"), tmp_path / "new" / "page.html"
    assert cli.main([str(directory), "--out", str(wanted)]) == 0
    links = [a["href"] for tag, a in Page(wanted.read_text()).elements if tag == "a"]
    assert links and all(link and (wanted.parent / link).exists() for link in links)
    assert not (directory / "report.html").exists()


def test_a_run_given_twice_is_one_run(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    assert cli.main([str(directory), str(directory)]) == 0
    assert (directory / "report.html").exists()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    first = report(directory, options=("--svg", str(tmp_path / "a")))
    assert report(directory, options=("--svg", str(tmp_path / "b"))) == first
    for picture in (tmp_path / "a").iterdir():
        assert picture.read_bytes() == (tmp_path / "b" / picture.name).read_bytes()


def test_pictures_need_no_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run(tmp_path / "run", metrics=[update(1), update(2, loss=None, finite=False), update(3)])
    names = ["loss", "bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second"]
    report(directory, options=("--svg", str(tmp_path / "svg")))
    report(directory, options=("--png", str(tmp_path / "png")))
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:6] == [str(tmp_path / "svg" / f"{name}.svg") for name in names]
    loss = ElementTree.parse(tmp_path / "svg" / "loss.svg").getroot()
    assert "skipped, not finite" in "".join(loss.itertext())
    for name in names:
        assert (tmp_path / "png" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError) as refused:
        cli.main([str(make_run(tmp_path / "run")), "--svg", str(tmp_path / "pictures")])
    assert str(refused.value) == "--svg needs matplotlib, which is not installed: pip install 'llm-jax[plot]'"


def test_mistakes_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, told in (
        ("none", "no such run directory"),
        ("file", "is no directory"),
        ("empty", "holds no run: there is neither config.json nor metrics.jsonl"),
    ):
        with pytest.raises(ConfigError) as refused:
            cli.main([str(tmp_path / name)])
        assert str(refused.value) == f"{tmp_path / name}: {told}"
    with pytest.raises(cli.ReportError, match="cannot be written") as failed:
        cli.main([str(make_run(tmp_path / "run")), "--out", str(tmp_path / "file" / "report.html")])
    assert failed.value.exit_code == CHECKPOINT


def test_a_report_is_made_without_jax_or_matplotlib(tmp_path: Path) -> None:
    program = (
        "import sys; from llm_jax.report import cli; cli.main(sys.argv[1:]); "
        "print(sorted({'jax', 'optax', 'flax', 'matplotlib', 'tensorboardX'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(make_run(tmp_path / "run"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_long_run_makes_a_small_report(tmp_path: Path) -> None:
    lines = [update(step) for step in range(1, 20_001)]
    text = report(make_run(tmp_path / "run", metrics=lines))
    assert len(text) < 600_000
    assert Page(text).open == []


def test_thinning_keeps_every_extreme_and_gap() -> None:
    x = np.arange(1_000_000.0)
    y = np.sin(x / 1e5)
    y[123_456], y[654_321] = 9.0, -9.0
    y[400_000:500_000] = np.nan
    few_x, few_y = thinned(x, y)
    assert len(few_x) <= MOST_POINTS
    assert (few_x[0], few_x[-1]) == (0, 999_999)
    assert 9.0 in few_y and -9.0 in few_y
    assert np.all(np.isnan(few_y[(few_x >= 402_000) & (few_x < 498_000)])) and np.any(
        (few_x > 402_000) & (few_x < 498_000)
    )
    assert np.all(np.diff(few_x) > 0) and np.array_equal(few_y, y[few_x.astype(int)], equal_nan=True)


def test_smoothing_is_the_mean_of_what_is_known_around() -> None:
    y = np.random.default_rng(0).normal(size=50)
    y[20:23] = np.nan
    mean = smoothed(y, 9)
    for i in (0, 1, 3, 10, 18, 30, 45, 49):
        half = min(i, 4)
        np.testing.assert_allclose(mean[i], np.nanmean(y[i - half : i + half + 1]))
    assert mean[0] == y[0]
    np.testing.assert_allclose(smoothed(y, 1), y)
    assert np.all(np.isnan(smoothed(np.full(5, np.nan), 3)))


def test_a_steep_beginning_does_not_take_the_picture(tmp_path: Path) -> None:
    lines = [update(step, loss=2.0 + 0.2 * math.sin(step) + (8.0 if step < 5 else 0.0)) for step in range(1, 1001)]
    (loss, *_) = charts([read(make_run(tmp_path / "run", metrics=lines, validation=[], eval=[]))])
    assert loss.y_range[0] < 1.81 and 2.19 < loss.y_range[1] < 3.0


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_ticks_are_round_few_and_inside(scale: Any) -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        low = 10 ** random.uniform(-6, 5)
        high = low * (1 + 10 ** random.uniform(-2, 6))
        values = ticks(low, high, scale)
        assert 1 <= len(values) <= 7
        assert all(low * (1 - 1e-6) <= value <= high * (1 + 1e-6) for value in values)
        assert values == sorted(values)
        assert len(set(map(tick_text, values))) == len(values)


def test_numbers_read_well() -> None:
    assert [tick_text(v) for v in (0, 0.5, 2, 9000, 20_000, 1_500_000, 2e-5, -0.25)] == [
        "0", "0.5", "2", "9000", "20k", "1.5M", "2e-5", "-0.25",
    ]  # fmt: skip
    assert value_text(9.8e-4, "rate") == "9.8e-4" and value_text(2.3456, "loss") == "2.346"
    assert [words.duration(s) for s in (0.4, 59, 59.6, 345, 7380, 90_000)] == [
        "0 s", "59 s", "1 min", "5 min 45 s", "2 h 3 min", "1 d 1 h",
    ]  # fmt: skip


def test_a_path_breaks_where_values_are_missing() -> None:
    x, y = np.arange(6.0), np.asarray([1.0, 2.0, np.nan, 3.0, np.nan, np.nan])
    assert path(x, y, dots=False) == "M0.0 1.0L1.0 2.0M3.0 3.0h.01"
    assert path(x, y, dots=True) == "M0.0 1.0h.01M1.0 2.0h.01M3.0 3.0h.01"


@pytest.mark.parametrize(
    ("bits", "told"),
    [
        (1.5, "That is fewer than both compressors on the same bytes."),
        (1.9, "That is fewer than zlib -9 on the same bytes."),
        (2.5, "That is more than both compressors on the same bytes."),
    ],
)
def test_the_verdict_says_who_is_better(bits: float, told: str) -> None:
    assert words.verdict(scores(1, "test", bits)).endswith(told)
    assert "compress" not in words.verdict({"bits_per_byte": bits})
