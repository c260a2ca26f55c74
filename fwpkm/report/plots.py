"""Pictures of a demo's results, as PNG: recall by length and depth, recall over length, and the training."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from fwpkm.files import write_atomically
from fwpkm.report.labels import length_label
from fwpkm.report.results import MODELS, Results, recall_by_length, recall_lengths
from fwpkm.report.theme import LIGHT, Theme

DPI = 144
GUESS_NUMBER = 1e-6  # six digits
GUESS_DIGIT = 0.1
_LINES: dict[str, dict[str, Any]] = {
    "memory": {"linestyle": "-", "marker": "o", "zorder": 4},
    "control": {"linestyle": (0, (5, 2)), "marker": "s", "zorder": 3},
}


def write_picture(draw: Callable[[Results, Theme], Figure], results: Results, path: str | Path) -> None:
    """Write the picture that ``draw`` makes, on light ground."""
    write_atomically(path, png(draw, results, LIGHT))


def png(draw: Callable[[Results, Theme], Figure], results: Results, theme: Theme) -> bytes:
    """The picture that ``draw`` makes, whatever style the caller's matplotlib has."""
    with matplotlib.style.context(["default", _style(theme)]):
        file = io.BytesIO()
        draw(results, theme).savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def draw_heat_map(results: Results, theme: Theme) -> Figure:
    """Two panels, a column a length, a row a depth; cells without a question are hatched."""
    lengths = recall_lengths(results)
    scale = LinearSegmentedColormap.from_list("share", theme.scale)
    figure = Figure(figsize=(10, 4.75), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True)
    for panel, (model, name) in zip(panels, MODELS.items(), strict=True):
        entries = recall_by_length(results, model)
        depths = [entries[length]["depths"] if length in entries else [] for length in lengths]
        edges = max((_edges(bins) for bins in depths), key=len, default=[0.0, 1.0])
        shares = np.full((len(edges) - 1, len(lengths)), np.nan)
        for column, bins in enumerate(depths):
            for row, cell in enumerate(bins):
                if cell["questions"] and cell["exact"] is not None:
                    shares[row, column] = cell["exact"]
        mesh = panel.pcolormesh(
            np.ma.masked_invalid(shares), cmap=scale, vmin=0, vmax=1, edgecolors=theme.card, linewidth=1.5
        )
        for (row, column), share in np.ndenumerate(shares):
            if np.isnan(share):
                panel.add_patch(_hatched(column, row, theme))
            else:
                panel.text(
                    column + 0.5,
                    row + 0.5,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=9 if len(lengths) <= 11 else 7,
                    color=_ink_on(scale(share)),
                )
        panel.set_title(name.capitalize(), color=theme.of(model))
        every = 2 if len(lengths) > 8 else 1
        panel.set_xticks(np.arange(0, len(lengths), every) + 0.5, [length_label(length) for length in lengths[::every]])
        every = 2 if len(edges) > 6 else 1
        panel.set_yticks(range(0, len(edges), every), [f"{edge:.0%}" for edge in edges[::every]])
        panel.set_ylim(len(edges) - 1, 0)
        panel.tick_params(length=0)
        panel.grid(False)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("Length of the text in bytes")
    panels[0].set_ylabel("Where the number stood\n(0%: at the start of the text)")
    bar = figure.colorbar(mesh, ax=panels, format=PercentFormatter(1, 0), aspect=30, pad=0.015)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label("Exact match")
    return figure


def draw_recall_curve(results: Results, theme: Theme) -> Figure:
    """One line a model, with markers and a band from the 95% lower bound up."""
    lengths = recall_lengths(results)
    figure = Figure(figsize=(10, 4.25), layout="constrained")
    panel = figure.subplots()
    for model, name in MODELS.items():
        entries = recall_by_length(results, model)
        exact, lower = ([entry[key] for entry in entries.values()] for key in ("exact", "exact_lower95"))
        panel.plot(list(entries), exact, color=theme.of(model), label=name, clip_on=False, **_LINES[model])
        panel.fill_between(list(entries), lower, exact, color=theme.of(model), alpha=0.18, linewidth=0)
    panel.axhline(GUESS_NUMBER, color=theme.faint, linestyle=":", linewidth=1.2, label="guessing: 1 in 1,000,000")
    length_axis(panel, lengths)
    panel.set_xlabel("Length of the text in bytes")
    panel.set_ylabel("Exact match")
    share_axis(panel)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_training_curve(results: Results, theme: Theme) -> Figure:
    """Two panels over the steps: loss, and digit accuracy with the mean gate where there is one."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for model, name in MODELS.items():
        log = results["training"][model]
        steps = [record["step"] for record in log]
        line = _LINES[model] | {"marker": "", "color": theme.of(model)}
        loss.plot(steps, [record["loss"] for record in log], label=name, **line)
        accuracy.plot(steps, [record["digit_accuracy"] for record in log], **line)
        gated = [(record["step"], record["gate"]) for record in log if record["gate"] is not None]
        if gated:
            accuracy.plot(
                *zip(*gated, strict=True), color=theme.faint, linestyle="-.", linewidth=1.4, label="mean gate"
            )
    accuracy.axhline(GUESS_DIGIT, color=theme.faint, linestyle=":", linewidth=1.2, label="guessing a digit: 1 in 10")
    loss.set_title("Loss on the text, nats a byte")
    loss.set_ylim(bottom=0)
    accuracy.set_title("Digits answered right")
    share_axis(accuracy)
    for panel in (loss, accuracy):
        panel.set_xlabel("Training step")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "font.size": 11,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.labelpad": 7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.h_pad": 0.09,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.facecolor": theme.card,
        "savefig.facecolor": theme.card,
        "axes.facecolor": theme.card,
        "axes.edgecolor": theme.rule,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.rule,
        "ytick.color": theme.rule,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.rule,
        "grid.linewidth": 0.8,
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "legend.handlelength": 2.8,
        "lines.linewidth": 2.2,
        "lines.markersize": 6,
    }


def _edges(bins: list[dict[str, Any]]) -> list[float]:
    return [cell["from"] for cell in bins] + [cell["to"] for cell in bins[-1:]]


def _hatched(column: int, row: int, theme: Theme) -> Rectangle:
    return Rectangle(
        (column + 0.03, row + 0.03), 0.94, 0.94, facecolor=theme.gap, edgecolor=theme.faint, hatch="////", linewidth=0
    )


def length_axis(panel: Axes, lengths: Sequence[int]) -> None:
    """Numbers of tokens, bytes or pairs, by powers of two."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [length_label(length) for length in lengths])
    panel.xaxis.set_minor_locator(NullLocator())


def share_axis(panel: Axes) -> None:
    panel.set_ylim(-0.03, 1.03)
    panel.yaxis.set_major_formatter(PercentFormatter(1, 0))


def _ink_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out more."""
    return "black" if luminance(colour) > 0.179 else "white"


def luminance(colour: Any) -> float:
    """Relative luminance as in WCAG."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))
