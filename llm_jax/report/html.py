"""HTML as a tree of elements: text stays text whatever it says, since only the serialiser writes markup."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Child = Element | str

# Control characters are shown as Unicode's pictures of them, since HTML does not allow them; those that have none, and
# those that would turn the direction of the text after them, as replacement characters.
_SHOWN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_SHOWN |= dict.fromkeys([*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


def element(tag: str, attributes: Mapping[str, str] | None = None, *children: Child) -> Element:
    """An element with its children, in order."""
    made = Element(tag, {name: visible(value) for name, value in (attributes or {}).items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif last is None:
            made.text = (made.text or "") + visible(child)
        else:
            last.tail = (last.tail or "") + visible(child)
    return made


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], attributes: Mapping[str, str] | None = None
) -> Element:
    """A table that scrolls sideways where it is too wide; each row's first cell is its heading."""
    lines = [
        element("tr", None, element("th", {"scope": "row"}, first), *(element("td", None, cell) for cell in rest))
        for first, *rest in rows
    ]
    columns = [element("tr", None, *(element("th", {"scope": "col"}, cell) for cell in head))] if head else []
    inner = element("table", attributes, element("thead", None, *columns), element("tbody", None, *lines))
    return element("div", {"class": "scroll"}, inner)


def data(value: Any) -> Element:
    """Numbers for the page's script; inert, since the browser does not run this type."""
    made = Element("script", {"type": "application/json"})
    made.text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return made


def page(title: str, style: str, script: str, body: Sequence[Element]) -> str:
    """A whole document that needs nothing else: no script but its own, no image that it does not hold, no network."""
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'; base-uri 'none'"
    styling, scripting = Element("style"), Element("script")
    styling.text, scripting.text = style, script
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, title),
        styling,
    )
    root = element("html", {"lang": "en"}, head, element("body", None, *body, scripting))
    return "<!doctype html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def visible(text: str) -> str:
    """Text as it can be shown and encoded: control characters as pictures, lone surrogates replaced."""
    return text.translate(_SHOWN).encode("utf-8", "replace").decode("utf-8")
