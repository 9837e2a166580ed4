"""The page on one text: what each token cost, who looks at whom, what each layer would say, whom the routers chose."""

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np

from llm_jax.data.config import SPECIAL_PIECES
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.inside import Chosen, Inside
from llm_jax.inspection.png import as_address, png, shades
from llm_jax.model.config import LayerConfig, ModelConfig
from llm_jax.report import html
from llm_jax.report.html import Child, data, element, table

# The accent of page.css, a little lighter, to be seen on light and on dark paper.
BLUE = (63, 125, 196)
# Stand-ins for what would not be seen.
ARROW = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
SHOWN = str.maketrans({" ": "\N{MIDDLE DOT}", "\n": ARROW, "\t": "\N{RIGHTWARDS ARROW TO BAR}"})


class Subject(NamedTuple):
    """What the page is on."""

    name: str
    """The run's."""
    step: int
    cfg: ModelConfig
    causal: bool
    tokenizer: Tokenizer
    ids: Sequence[int]
    """Of the text, BOS first."""
    cut: bool
    """Whether these are only the first of the text."""


def render(subject: Subject, inside: Inside) -> str:
    """The document, which needs nothing else: no network, and without its script only the large map stands still."""
    parts = [_header(subject, inside), _losses(subject, inside), _maps(subject, inside), _lens(subject, inside)]
    if inside.chosen:
        parts.append(_experts(subject, inside.chosen))
    return _document(f"{subject.name}, inside", [element("main", None, *parts)])


def label(tokenizer: Tokenizer, i: int) -> str:
    """A token of which every character is seen: spaces as dots, newlines as arrows."""
    return _spelled(tokenizer, i).translate(SHOWN)


def _spelled(tokenizer: Tokenizer, i: int) -> str:
    """A token's text; bytes that are no characters in hexadecimal."""
    if i in tokenizer.control_ids:
        return SPECIAL_PIECES[i]
    text = tokenizer.piece_texts[i]
    try:
        return text.decode()
    except UnicodeDecodeError:
        return f"<{text.hex().upper()}>"


def told_sight(layer: LayerConfig, cfg: ModelConfig, *, causal: bool) -> str:
    """Whom a layer's tokens see, in words."""
    if layer.window is not None:
        return f"the last {layer.window}" if causal else f"{layer.window // 2} to either side"
    if layer.block is not None:
        also = f", and the first {cfg.global_tokens}" if cfg.global_tokens else ""
        return f"blocks of {layer.block}{also}"
    return "all before" if causal else "all"


def _header(subject: Subject, inside: Inside) -> Element:
    nats_N = inside.guesses.nats_N.astype(np.float64)
    n, right = len(nats_N), float(np.mean(inside.guesses.rank_N == 1))
    loss = f"{n} tokens, {nats_N.mean():.3f} nats each"
    if subject.causal:
        n_bytes = int(subject.tokenizer.piece_bytes[list(subject.ids)].sum())
        loss += f", {nats_N.sum() / math.log(2) / n_bytes:.3f} bits per byte"
    else:
        loss += ", each of them hidden alone"
    lead = f"{loss}; the first guess is right for {right:.0%}."
    state = f"After {subject.step} steps; everything is computed in float32."
    if subject.cut:
        state += f" The text is longer; its first {n} tokens are shown."
    return element(
        "header",
        None,
        element("p", {"class": "kicker"}, "A text from the inside"),
        element("h1", None, subject.name),
        element("p", {"class": "lead"}, lead),
        element("p", {"class": "state"}, state),
    )


def _losses(subject: Subject, inside: Inside) -> Element:
    top = math.log(subject.cfg.vocab_size)
    spans = []
    for place, i in enumerate(subject.ids[1:]):
        nats, rank = float(inside.guesses.nats_N[place]), int(inside.guesses.rank_N[place])
        best = zip(inside.guesses.best_NX[place], inside.guesses.probabilities_NX[place], strict=True)
        guesses = ", ".join(f"{label(subject.tokenizer, int(guess))} {share:.1%}" for guess, share in best)
        # A newline costs something too, so it is seen.
        spelled = _spelled(subject.tokenizer, i).replace("\n", f"{ARROW}\n")
        title = f"{label(subject.tokenizer, i)}\n{nats:.3f} nats, rank {rank}\nguesses: {guesses}"
        spans.append(element("span", {"class": "token", "title": title, **_heat(nats / top)}, spelled))
    steps = [element("span", {"class": "token", **_heat(nats / top)}, f"{nats:.1f}") for nats in np.linspace(0, top, 6)]
    given = "those before it" if subject.causal else "all the others, itself hidden"
    hint = (
        f"The warmer, the more nats a token costs, given {given}; the warmest is a guess among all "
        f"{subject.cfg.vocab_size} tokens. Pointing at one shows its rank and the five likeliest."
    )
    return _section(
        "Loss of each token",
        hint,
        element("p", {"class": "scale"}, *steps, " nats"),
        element("div", {"class": "sample"}, *spans),
    )


def _maps(subject: Subject, inside: Inside) -> Element:
    L, H, T, _ = inside.shares_LHTS.shape
    rows: list[list[Child]] = []
    first = ""
    for number, layer in enumerate(subject.cfg.layers):
        sight = told_sight(layer, subject.cfg, causal=subject.causal)
        images: list[Child] = []
        for head in range(H):
            address = as_address(png(shades(inside.shares_LHTS[number, head]), BLUE))
            first = first or address
            told = f"layer {number}, head {head}"
            images.append(element("img", {"src": address, "alt": told, "title": told, "class": "map"}))
        name = element("span", None, f"layer {number}", element("small", None, sight))
        rows.append([name, element("div", {"class": "heads"}, *images)])
    sinks = " Heads have a sink, so a row may add up to less than 1." if subject.cfg.attention_sinks else ""
    hint = (
        f"{L} layers of {H} heads. A row is a token that looks, a column one that it looks at; the stronger the "
        f"colour, the more of it is read, by the square root.{sinks} A click enlarges a map; pointing at a place "
        "names it."
    )
    large = element(
        "figure",
        {"class": "large"},
        element("figcaption", {"class": "told"}, "layer 0, head 0"),
        element("img", {"src": first, "alt": "the chosen map, enlarged"}),
        element("p", {"class": "note place"}, f"{T} tokens"),
        data([label(subject.tokenizer, i) for i in subject.ids]),
    )
    return _section("Attention", hint, large, table((), rows, {"class": "maps"}))


def _lens(subject: Subject, inside: Inside) -> Element:
    tokenizer, ids = subject.tokenizer, list(subject.ids)
    there = [*ids[1:], None] if subject.causal else [*ids]
    rows: list[list[Child]] = []
    for place, (i, expected) in enumerate(zip(ids, there, strict=True)):
        row: list[Child] = [label(tokenizer, i)]
        if subject.causal:
            row.append("" if expected is None else label(tokenizer, expected))
        for guess, share in zip(inside.lens_LT[:, place], inside.lens_probabilities_LT[:, place], strict=True):
            right = " right" if guess == expected else ""
            title = f"{label(tokenizer, int(guess))} {share:.1%}"
            row.append(
                element("span", {"class": f"guess{right}", "title": title, **_heat(float(share))}, title.split(" ")[0])
            )
        rows.append(row)
    stages = ["embedding", *(f"layer {number}" for number in range(len(inside.lens_LT) - 1))]
    head = ["token", "then comes", *stages] if subject.causal else ["token", *stages]
    what = "what comes next" if subject.causal else "the token itself, which is seen"
    hint = (
        f"The last norm and the output head on the residual stream after each layer (nostalgebraist 2020): its first "
        f"guess at {what}. The stronger the colour, the surer; a right guess is bold."
    )
    return _section("Logit lens", hint, element("div", {"class": "lens"}, table(head, rows)))


def _experts(subject: Subject, chosen: dict[int, Chosen]) -> Element:
    moe = subject.cfg.moe
    assert moe is not None
    bars = [_load(number, of_layer.experts_TX, moe.experts) for number, of_layer in chosen.items()]
    rows: list[list[Child]] = []
    for place, i in enumerate(subject.ids):
        row: list[Child] = [label(subject.tokenizer, i)]
        for experts_TX, gates_TX in chosen.values():
            told = [
                element("span", {"class": f"expert c{expert % 8}"}, f"{expert}", element("small", None, f" {gate:.2f}"))
                for expert, gate in zip(experts_TX[place], gates_TX[place], strict=True)
            ]
            row.append(element("span", {"class": "choices"}, *told))
        rows.append(row)
    hint = f"Each token's {moe.top_k} of {moe.experts} experts, best first, with the weight of their results."
    head = ["token", *(f"layer {number}" for number in chosen)]
    return _section("Experts", hint, *bars, element("div", {"class": "lens"}, table(head, rows)))


def _load(number: int, experts_TX: np.ndarray, n_experts: int) -> Element:
    """A bar an expert: the share of a layer's choices that fell on it, against the line of even load."""
    shares = np.bincount(experts_TX.ravel(), minlength=n_experts) / experts_TX.size
    even = 1 / n_experts
    top = max(float(shares.max()), 2 * even)
    bars = [
        element(
            "i",
            {"class": "c0", "style": f"height:{100 * share / top:.1f}%", "title": f"expert {expert}: {share:.1%}"},
        )
        for expert, share in enumerate(shares)
    ]
    line = element("hr", {"style": f"bottom:{100 * even / top:.1f}%"})
    caption = f"layer {number}: {np.count_nonzero(shares)} of {n_experts} chosen; the line is an even share"
    return element(
        "div",
        {"class": "chart loads"},
        element("div", {"class": "load-bars"}, *bars, line),
        element("p", {"class": "note"}, caption),
    )


def _section(title: str, hint: str, *parts: Element) -> Element:
    return element("section", None, element("h2", None, title), element("p", {"class": "hint"}, hint), *parts)


def _heat(share: float) -> dict[str, str]:
    """How strongly something is coloured, from 0 to 1."""
    return {"style": f"--heat:{100 * min(max(share, 0.0), 1.0):.0f}%"}


def _document(title: str, body: Sequence[Element]) -> str:
    """A whole document in the report's style."""
    style = files("llm_jax.report").joinpath("page.css").read_text(encoding="utf-8")
    own = files("llm_jax.inspection")
    style += own.joinpath("inspection.css").read_text(encoding="utf-8")
    return html.page(title, style, own.joinpath("inspection.js").read_text(encoding="utf-8"), body)
