"""Pictures of what ``fwpkm eval`` measures, each from the JSON file of its evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fwpkm.report.labels import percent
from fwpkm.report.plots import length_axis, share_axis
from fwpkm.report.theme import Theme

Results = Mapping[str, Any]


def draw_perplexity(results: Results, theme: Theme) -> Figure:
    """Perplexity over the position in the text, a line for each way to run the memories."""
    figure, panel = _panel()
    edges: set[int] = set()
    for run, style in zip(results["figures"]["runs"], _styles(theme), strict=False):
        bins = [x for x in run["positions"] if x["from"] > 1] or run["positions"]
        middles = [(x["from"] * x["to"]) ** 0.5 for x in bins]
        panel.plot(middles, [x["perplexity"] for x in bins], marker="o", label=f"memory {run['memory']}", **style)
        edges |= {x["from"] for x in bins}
    length_axis(panel, sorted(edges))
    panel.set_xlabel("Tokens read before, from ... on")
    panel.set_ylabel("Perplexity a token")
    panel.set_title(results["figures"]["text"]["name"])
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_needles(results: Results, theme: Theme) -> Figure:
    """Exact match over the length of the text, a line for each number of readings, with the 95% lower bound."""
    figure, panel = _panel()
    rows = results["figures"]["recall"]
    for readings, style in zip(sorted({row["readings"] for row in rows}), _styles(theme), strict=False):
        mine = sorted((row for row in rows if row["readings"] == readings), key=lambda row: row["length"])
        lengths = [row["length"] for row in mine]
        label = f"{readings} readings" if readings > 1 else "1 reading"
        panel.plot(lengths, [row["exact"] for row in mine], marker="o", clip_on=False, label=label, **style)
        lower, exact = ([row[x] for row in mine] for x in ("exact_lower95", "exact"))
        panel.fill_between(lengths, lower, exact, color=style["color"], alpha=0.15, linewidth=0)
    length_axis(panel, sorted({row["length"] for row in rows}))
    panel.set_xlabel("Length of the text in bytes")
    panel.set_ylabel("Exact match")
    share_axis(panel)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def draw_recall(results: Results, theme: Theme) -> Figure:
    """The share of values given back over the number of pairs, with the 95% lower bound."""
    figure, panel = _panel()
    rows = sorted(results["figures"]["recall"], key=lambda row: row["pairs"])
    pairs, right = ([row[x] for row in rows] for x in ("pairs", "right"))
    panel.plot(pairs, right, marker="o", color=theme.memory, clip_on=False, label="values given right")
    panel.fill_between(
        pairs, [row["right_lower95"] for row in rows], right, color=theme.memory, alpha=0.15, linewidth=0
    )
    chance = rows[0]["chance"]
    panel.axhline(chance, color=theme.faint, linestyle=":", linewidth=1.2, label=f"guessing: {percent(chance)}")
    length_axis(panel, pairs)
    panel.set_xlabel("Pairs in a sequence")
    panel.set_ylabel("Values right")
    share_axis(panel)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def draw_adaptation(results: Results, theme: Theme) -> Figure:
    """The curve of each run over A, B, A; beside it what the text of A costs at first, at once again, and after B."""
    figure = Figure(figsize=(10, 4.25), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(2.2, 1))
    runs = results["figures"]["runs"]
    length = results["settings"]["length"]
    names = "at first", "again\nat once", "again\nafter B"
    width = 0.8 / len(runs)
    for i, (run, style) in enumerate(zip(runs, _styles(theme), strict=False)):
        for part in range(3):
            points = [x for x in run["curve"] if x["from"] // length == part]
            middles = [(x["from"] + x["to"]) / 2 for x in points]
            label = f"memory {run['memory']}" if part == 0 else None
            curve.plot(middles, [x["loss"] for x in points], label=label, **style)
        places = np.arange(3) + (i - (len(runs) - 1) / 2) * width
        losses = [run[x] for x in ("first", "again", "after")]
        bars.bar(places, losses, width * 0.9, color=style["color"])
        for place, loss in zip(places, losses, strict=True):
            bars.text(place, loss, f"{loss:.2f}", ha="center", va="bottom", fontsize=9)
    for switch in (length, 2 * length):
        curve.axvline(switch, color=theme.faint, linestyle=":", linewidth=1.2)
    a, b = (text["name"] for text in results["figures"]["texts"])
    curve.set_xticks([length * (x + 0.5) for x in range(3)], [f"A: {a}", f"B: {b}", "the same of A"])
    curve.tick_params(axis="x", length=0)
    curve.set_ylabel("Nats a token")
    curve.set_title("While reading")
    bars.set_xticks(range(3), names)
    bars.set_title("The text of A")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def draw_gates(results: Results, theme: Theme) -> Figure:
    """The distribution of the gates on each text, a panel for each layer."""
    texts: Sequence[Any] = results["figures"]["texts"]
    layers = texts[0]["layers"]
    figure = Figure(figsize=(10, 4.25), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for i, panel in enumerate(panels):
        for text, style in zip(texts, _styles(theme), strict=False):
            shares = text["layers"][i]["histogram"]
            edges = np.linspace(0, 1, len(shares) + 1)
            label = f"{text['name']}" if i == 0 else None
            panel.stairs(shares, edges, label=label, baseline=None, **style)
        panel.set_yscale("symlog", linthresh=1e-4)
        panel.set_ylim(0, 1)
        panel.set_xlim(0, 1)
        panel.set_title(f"Block {layers[i]['block']}")
        panel.set_xlabel("Gate")
    panels[0].set_ylabel("Share of tokens")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 4.25), layout="constrained")
    return figure, figure.subplots()


def _styles(theme: Theme) -> Iterator[dict[str, Any]]:
    """Colour and dash of one line after the other."""
    colours = cycle((theme.memory, theme.control, theme.right, theme.wrong, theme.faint))
    dashes = cycle(("-", (0, (5, 2)), "-.", ":"))
    for colour, dash in zip(colours, dashes, strict=False):
        yield {"color": colour, "linestyle": dash}
