"""One self-contained HTML page of what a model's memories did along a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwpkm.evaluation.inspection import InspectedLayer, Inspection
from fwpkm.files import write_atomically
from fwpkm.report.labels import count, decimal, percent
from fwpkm.report.markup import Markup, element, visible
from fwpkm.report.parts import document, fact_list, table
from fwpkm.report.style import style_sheet

_SLOTS = 8  # shown of a token, those of the largest weights
_LEAST_SHARE = 5  # thousandths; weaker sources are shown together


def write_inspect_page(inspection: Inspection, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write one HTML file with everything in it; ``facts`` say how it was made."""
    write_atomically(path, inspect_page(inspection, facts))


def inspect_page(inspection: Inspection, facts: Mapping[str, Any]) -> str:
    """The whole document."""
    style, script = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    return document(
        "FwPKM: what a memory recalls",
        style_sheet() + style,
        _opening(inspection),
        element("main", _reading(inspection), _usage(inspection), _facts(inspection, facts)),
        element("script", Markup(_data(inspection)), type="application/json", id="data"),
        script=script,
    )


def _opening(inspection: Inspection) -> Markup:
    return element(
        "header",
        element("h1", "What a memory recalls, and from where"),
        element(
            "p",
            "A language model has read the text below. While it reads, every token writes into a table, the ",
            element("strong", "fast-weight memory", class_="memory"),
            ", and every token reads from it what earlier ones have written. The stronger the colour behind a token, "
            "the wider its gate is open: the more of it is written, and the more of what the memory gives it goes into "
            "the model. Where there is no colour the memory is hardly used.",
        ),
        element(
            "p",
            element("strong", "Point at a token"),
            " to see what it read from the memory: ",
            element("strong", "which earlier tokens it recalls", class_="control"),
            ". Click to keep it, click again or press Esc to let go; the left and right arrow keys go on from it. "
            f"The memory is written after every {count(inspection.chunk_size)} tokens, so that nothing of the last few "
            "can come from there yet.",
        ),
        element("noscript", element("p", "This page needs JavaScript, which it brings along, to show the text.")),
    )


def _reading(inspection: Inspection) -> Markup:
    options = [element("option", f"block {layer.block}", value=i) for i, layer in enumerate(inspection.layers)]
    legend = element(
        "div",
        element(
            "span",
            "gate 0",
            element("span", class_="ramp", role="img", aria_label="from no colour to strong colour"),
            "gate 1",
        ),
        element(
            "span",
            element("span", "the token shown", class_="swatch here"),
            element("span", "what it recalls", class_="swatch source"),
        ),
        element("label", "Memory of ", element("select", *options, id="layer")),
        class_="legend",
    )
    strip = element("canvas", id="strip", role="img", aria_label="The gates of the whole text; click to go there")
    return element(
        "section",
        element("h2", "The text"),
        legend,
        strip,
        element("div", element("pre", id="text"), element("aside", id="panel", class_="card"), class_="reading"),
    )


def _usage(inspection: Inspection) -> Markup:
    rows = [
        [
            f"block {layer.block}",
            count(layer.n_slots),
            percent(layer.usage.coverage),
            percent(layer.usage.collisions),
            decimal(layer.usage.divergence),
            decimal(float(layer.gates.mean())),
            percent(float((layer.gates > 0.5).double().mean())),
        ]
        for layer in inspection.layers
    ]
    caption = (
        "Coverage: the share of all slots that were read at least once. Collisions: the share of reads whose slot was "
        "read more than once in their chunk; what they write there is averaged. KL: how far the slots' shares of the "
        "reads are from all being equal, in nats; 0 is equal, and a text of few reads cannot come near it."
    )
    columns = ["Memory of", "Slots", "Coverage", "Collisions", "KL to uniform", "Mean gate", "Gates above ½"]
    return element("section", element("h2", "How the slots are used"), table(caption, columns, rows))


def _facts(inspection: Inspection, facts: Mapping[str, Any]) -> Markup:
    error = max(layer.error for layer in inspection.layers)
    return element(
        "section",
        element("h2", "How this was made"),
        element("div", fact_list(facts), class_="card"),
        element(
            "p",
            "What a token read is a weighted sum of slots, and a slot is what it was before the text plus what tokens "
            "have added since: so every read splits exactly into these parts. Here the parts of every read, all of "
            f"them, add up to what the memory gave within {error:.0e}. A part's share is its projection on the read; "
            "the shares of a read add up to 100%, and a negative one (striped) points away from it. Sources below "
            f"{_LEAST_SHARE / 10}% are shown together.",
            class_="faint",
        ),
    )


def _data(inspection: Inspection) -> str:
    """JSON for the script: shares in thousandths, gates, weights and probabilities in hundredths."""
    words = sorted(set(inspection.guesses))
    number = {word: i for i, word in enumerate(words)}
    data = {
        "texts": [visible(text) for text in inspection.texts],
        "words": [visible(word) for word in words],
        "guesses": [number[guess] for guess in inspection.guesses],
        "confidence": _rounded(inspection.confidence, 100),
        "probability": _rounded(inspection.probability, 100),
        "lookahead": inspection.lookahead,
        "layers": [_layer(layer) for layer in inspection.layers],
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _layer(layer: InspectedLayer) -> dict[str, Any]:
    order = layer.weights.abs().argsort(1, descending=True)[:, :_SLOTS]
    shares: Sequence[Sequence[int]] = _rounded(layer.shares, 1000)
    sources = [
        [x for pair in zip(found, parts, strict=True) if abs(pair[1]) >= _LEAST_SHARE for x in pair]
        for found, parts in zip(layer.sources.tolist(), shares, strict=True)
    ]
    return {
        "gates": _rounded(layer.gates, 100),
        "base": _rounded(layer.base, 1000),
        "sources": sources,
        "slots": layer.slots.gather(1, order).tolist(),
        "weights": _rounded(layer.weights.gather(1, order), 100),
    }


def _rounded(x: Tensor, scale: int) -> Any:
    """Whole numbers of ``1 / scale``; what is no number counts as 0."""
    return (x.double() * scale).nan_to_num(0, 0, 0).round().to(torch.int64).tolist()
