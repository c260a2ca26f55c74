"""One self-contained HTML page of a demo's results."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fwpkm.files import write_atomically
from fwpkm.report import plots
from fwpkm.report.labels import MISSING, bounded, count, decimal, length_label, percent
from fwpkm.report.markup import Markup, element
from fwpkm.report.parts import boxed, document, fact_list, table, table_body
from fwpkm.report.questions import questions_to_read
from fwpkm.report.results import MODELS, Results, recall_by_length, recall_lengths
from fwpkm.report.style import style_sheet
from fwpkm.report.table import COLUMNS, recall_rows
from fwpkm.report.theme import DARK, LIGHT

_HEADLINES = (2**10, 2**17, 2**20)


def write_page(results: Results, path: str | Path) -> None:
    """Write one HTML file with everything in it: figures for light and dark ground, tables, questions, settings."""
    write_atomically(path, page(results))


def page(results: Results) -> str:
    """The whole document."""
    sections = (_pictures, _recall_table, _other_tables, questions_to_read, _facts)
    return document(
        "FwPKM: a memory that writes as it reads",
        style_sheet(),
        _opening(results),
        element("main", *(section(results) for section in sections)),
        element(
            "footer",
            element("p", f"fwpkm {results['version']}, {results['date']}. K and M are 1,024 and 1,048,576 bytes."),
        ),
    )


def _opening(results: Results) -> Markup:
    lengths = recall_lengths(results)
    span = " to ".join(dict.fromkeys(map(length_label, lengths[:1] + lengths[-1:])))
    return element(
        "header",
        element("h1", "A memory that writes as it reads"),
        element(
            "p",
            "Two small language models read real Python source byte by byte, with sentences such as “The secret number "
            f"for ID-a1b2 is 123456.” scattered through it, and after texts of {span} bytes they are asked for those "
            "numbers. ",
            "The two are built alike, except that one has a ",
            element("strong", "fast-weight memory", class_="memory"),
            ", a table of fixed size that it rewrites while it reads; the other, the ",
            element("strong", "control", class_="control"),
            ", has to do without.",
        ),
        element("div", *(_tile(results, length) for length in _headline_lengths(lengths)), class_="tiles"),
        element("p", "Exact match: the share of questions with all six digits right.", class_="faint"),
    )


def _headline_lengths(lengths: Sequence[int]) -> list[int]:
    """1K, 128K and 1M, or the shortest, the middle and the longest text of a run without those."""
    if set(_HEADLINES) <= set(lengths):
        return list(_HEADLINES)
    return sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]}) if lengths else []


def _tile(results: Results, length: int) -> Markup:
    rows = []
    for model, name in MODELS.items():
        entry = recall_by_length(results, model).get(length)
        bar = element("span", style=f"--share: {entry['exact'] if entry else 0:.4f}")
        rows += [
            element("dt", name),
            element("dd", percent(entry["exact"]) if entry else MISSING, class_=model),
            element("dd", bar, class_=f"bar {model}", aria_hidden="true"),
        ]
    title = element("h2", f"After {length_label(length)} bytes")
    return element("div", title, element("dl", *rows), class_="card")


def _pictures(results: Results) -> Markup:
    cells = [
        cell["questions"]
        for entry in results["recall"]
        for cell in entry["depths"]
        if cell["questions"] and cell["exact"] is not None
    ]
    asked = f" Behind a cell are {_range(cells)} questions." if cells else ""
    recall = {
        name: ", ".join(
            f"{percent(entry['exact'])} at {length_label(length)}"
            for length, entry in recall_by_length(results, model).items()
        )
        for model, name in MODELS.items()
    }
    said = "; ".join(f"{name} {shares or 'not measured'}" for name, shares in recall.items())
    ends = "; ".join(
        f"{name} loss {decimal(log[-1]['loss'])} and digit accuracy {percent(log[-1]['digit_accuracy'])}"
        for model, name in MODELS.items()
        if (log := results["training"][model])
    )
    return element(
        "section",
        element("h2", "What is remembered, and for how long"),
        _figure(
            results,
            plots.draw_recall_curve,
            f"Exact match over the length of the text: {said}.",
            "Exact match over the length of the text. The bands reach down to the 95% lower bound. "
            "A guess is right once in a million.",
        ),
        _figure(
            results,
            plots.draw_heat_map,
            f"Two heat maps of exact match by length and depth, with and without memory. Over all depths: {said}.",
            "Exact match in percent, by the length of the text and by where in it the number stood. "
            f"Hatched: no question fell there.{asked}",
        ),
        _figure(
            results,
            plots.draw_training_curve,
            f"Loss and digit accuracy over the training. At its end: {ends}.",
            f"The training of both models. At its end: {ends}. The gate is how much of a byte the memory writes, "
            "from 0 to 1.",
        ),
    )


def _figure(results: Results, draw: Callable[[Results, Any], Figure], alt: str, caption: str) -> Markup:
    light, dark = (plots.png(draw, results, theme) for theme in (LIGHT, DARK))
    width, height = (int.from_bytes(light[at : at + 4], "big") for at in (16, 20))  # from the header of a PNG
    picture = element(
        "picture",
        element("source", media="(prefers-color-scheme: dark)", srcset=_embedded(dark)),
        element("img", src=_embedded(light), width=width, height=height, alt=alt),
    )
    return element("figure", element("div", picture, class_="scroll"), element("figcaption", caption), class_="card")


def _embedded(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _recall_table(results: Results) -> Markup:
    groups = [
        element("th", group, scope="colgroup", colspan=len(list(columns)), class_=_group_class(group))
        for group, columns in groupby(group for group, _ in COLUMNS)
    ]
    head = element(
        "thead",
        element("tr", element("th", "Length", scope="col", rowspan=2), *groups),
        element("tr", *(element("th", name, scope="col") for _, name in COLUMNS)),
    )
    caption = (
        "Exact match stands with its 95% lower bound; digits are the single digits that are right. Cost and load are "
        "those of the model with memory; load is how often a slot was written to on average, the same counting only "
        "the open part of the gates, and the share of slots that were written to at all."
    )
    recall = element("table", element("caption", caption), head, table_body(recall_rows(results)))
    return element("section", element("h2", "Recall in numbers"), boxed(recall))


def _group_class(group: str) -> str | None:
    return {"With memory": "memory", "Without memory": "control"}.get(group)


def _other_tables(results: Results) -> Markup:
    overwritten = [
        [
            MODELS[entry["model"]],
            length_label(entry["length"]),
            count(entry["questions"]),
            bounded(entry),
            percent(entry["stale"]),
        ]
        for entry in results["overwritten"]
    ]
    switches = {"on": "switched on", "off": "switched off", "none": "none"}
    perplexity = [
        [
            MODELS[entry["model"]],
            switches[entry["memory"]],
            count(entry["bytes"]),
            f"{entry['loss']:.4f}",
            f"{entry['perplexity']:.3f}",
        ]
        for entry in results["perplexity"]
    ]
    return element(
        "section",
        element("h2", "Numbers that changed, and ordinary text"),
        table(
            "Some numbers are told twice. Only the latest counts; stale answers are the share that gave an older one.",
            ["Model", "Length", "Questions", "Exact match (bound)", "Stale answers"],
            overwritten,
        ),
        table(
            "How well the models predict Python source that they were not trained on; lower is better.",
            ["Model", "Memory", "Bytes", "Loss, nats a byte", "Perplexity a byte"],
            perplexity,
            words=2,
        ),
    )


def _facts(results: Results) -> Markup:
    return element(
        "section",
        element("h2", "How this was made"),
        element(
            "div",
            element(
                "p", element("code", results["command"]), f" ran on {results['date']} with fwpkm {results['version']}."
            ),
            element("h3", "Settings"),
            fact_list(results["settings"]),
            element("h3", "Parameters"),
            fact_list({MODELS[model]: count(number) for model, number in results["parameters"].items()}),
            element("h3", "Training time"),
            fact_list(
                {
                    name: f"{count(log[-1]['seconds'])} s, {count(log[-1]['step'])} steps"
                    for model, name in MODELS.items()
                    if (log := results["training"][model])
                }
            ),
            element("h3", "Machine"),
            fact_list(results["machine"]),
            class_="card",
        ),
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return count(low) if low == high else f"{count(low)} to {count(high)}"
