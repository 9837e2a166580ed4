"""What the report and the log make of experts: load, entropy and drops."""

import json
import math
from pathlib import Path

from llm_jax.report.curves import charts
from llm_jax.report.page import render
from llm_jax.report.record import read
from tests.test_report import STEPS, Page, make_run, update


def run_with(directory: Path, *, dropped: float = 0.0, load: list[float] | None = None) -> Path:
    shares = [0.4, 0.3, 0.2, 0.1] if load is None else load
    routing = {"load_max_over_mean": 1.6, "router_entropy": math.log(4), "dropped": dropped}
    lines = [update(step, **routing, expert_load=shares) for step in range(1, STEPS + 1)]
    return make_run(directory, metrics=lines)


def test_a_dense_run_shows_nothing_of_experts(tmp_path: Path) -> None:
    record = read(make_run(tmp_path / "dense"))
    assert record.expert_load == [] and "Experts" not in render([record], tmp_path / "report.html")
    assert not {"load", "router_entropy", "dropped"} & {chart.key for chart in charts([record])}


def test_load_entropy_and_drops_are_shown(tmp_path: Path) -> None:
    record = read(run_with(tmp_path / "sparse", dropped=0.05))
    assert {"load", "router_entropy", "dropped"} <= {chart.key for chart in charts([record])}
    page = Page(render([record], tmp_path / "report.html"))
    titles = [str(a["title"]) for tag, a in page.elements if tag == "i" and "expert" in str(a.get("title"))]
    assert titles[0] == "expert 0: 40.0%, 1.60 times an even share" and len(titles) == 4
    assert "4 experts; the fullest has 1.60 times an even share, the emptiest 0.40" in page.words


def test_what_drops_nothing_has_no_chart_of_it(tmp_path: Path) -> None:
    assert "dropped" not in {chart.key for chart in charts([read(run_with(tmp_path / "dropless"))])}


def test_the_last_load_is_read_past_a_half_written_line_and_broken_shares(tmp_path: Path) -> None:
    directory = run_with(tmp_path / "run")
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps(update(STEPS + 1, expert_load=[None, 1.0])) + '\n{"step": 122, "expert_lo')
    record = read(directory)
    assert math.isnan(record.expert_load[0]) and record.expert_load[1] == 1.0
    assert "fullest has 2.00 times" in render([record], tmp_path / "report.html")
