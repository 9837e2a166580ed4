"""How evenly the experts were chosen in the last update, as a picture made of elements."""

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from llm_jax.report.html import element
from llm_jax.report.plot import colour
from llm_jax.report.record import Record


def experts(records: Sequence[Record]) -> Element | None:
    """A bar an expert for each run that has any, against the line of even load; None without experts."""
    shown = [(run, record) for run, record in enumerate(records) if record.expert_load]
    if not shown:
        return None
    hint = "Each expert's share of the tokens' choices in the last update, over all layers. The line is an even share."
    parts = [_bars(record, run, several=len(records) > 1) for run, record in shown]
    return element("section", None, element("h2", None, "Experts"), element("p", {"class": "hint"}, hint), *parts)


def _bars(record: Record, run: int, *, several: bool) -> Element:
    load = [share if math.isfinite(share) else 0.0 for share in record.expert_load]
    even = 1 / len(load)
    top = max(*load, 2 * even)
    bars = [
        element(
            "i",
            {
                "class": colour(run),
                "style": f"height:{100 * share / top:.1f}%",
                "title": f"expert {expert}: {share:.1%}, {share / even:.2f} times an even share",
            },
        )
        for expert, share in enumerate(load)
    ]
    line = element("hr", {"style": f"bottom:{100 * even / top:.1f}%"})
    ends = f"the fullest has {max(load) / even:.2f} times an even share, the emptiest {min(load) / even:.2f}"
    worst = f"{len(load)} experts; {ends}"
    caption = element("p", {"class": "hint"}, f"{record.name}: {worst}." if several else f"{worst}.")
    return element("div", {"class": "chart loads"}, element("div", {"class": "load-bars"}, *bars, line), caption)
