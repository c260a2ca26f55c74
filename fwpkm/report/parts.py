"""What pages are made of: a document, tables, lists of facts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fwpkm.report.markup import Markup, element


def document(title: str, style: str, *content: Markup, script: str = "") -> str:
    """A whole page that asks nobody for anything: its policy allows what stands in it, and no script but ``script``."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        content += (element("script", Markup(script)),)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(style)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *content), lang='en')}"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Markup:
    """A table in a box, or nothing without rows; the first ``words`` columns are set as words, not numbers."""
    if not rows:
        return Markup()
    head = (
        element("th", name, scope="col", class_="words" if place < words else None)
        for place, name in enumerate(columns)
    )
    body = table_body(rows, words)
    return boxed(element("table", element("caption", caption), element("thead", element("tr", *head)), body))


def table_body(rows: Sequence[Sequence[str]], words: int = 0) -> Markup:
    """A table's body; a row's first cell is its header, and the first ``words`` cells are set as words, not numbers."""
    written = []
    for first, *others in rows:
        cells = [element("th", first, scope="row", class_="words" if words else None)]
        cells += [
            element("td", cell, class_="words" if place < words else None) for place, cell in enumerate(others, start=1)
        ]
        written.append(element("tr", *cells))
    return element("tbody", *written)


def boxed(table: Markup) -> Markup:
    """A table that scrolls inside a box."""
    return element("div", element("div", table, class_="scroll"), class_="card")


def fact_list(facts: Mapping[str, Any]) -> Markup:
    """Names and what they stand for."""
    pairs = (
        element("div", element("dt", name.replace("_", " ")), element("dd", _value(value)))
        for name, value in facts.items()
    )
    return element("dl", *pairs, class_="facts")


def _value(value: object) -> str:
    return ", ".join(map(_value, value)) if isinstance(value, list | tuple) else str(value)
