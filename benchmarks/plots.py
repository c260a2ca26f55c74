"""The picture of growth: time and memory over tokens and over slots, ours and the others'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fwpkm.files import write_atomically
from fwpkm.report.labels import length_label
from fwpkm.report.plots import png
from fwpkm.report.theme import LIGHT, Theme

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "cpu-growth.png"
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "fwpkm": ("fast_weight_memory", {"linestyle": "-", "marker": "o", "zorder": 4}),
    "plain": ("plain PyTorch", {"linestyle": (0, (5, 2)), "marker": "s", "zorder": 3}),
    "released": ("released code", {"linestyle": (0, (1, 1.5)), "marker": "^", "zorder": 2}),
}
OVER = {"tokens": ("Tokens", 1), "n_subkeys": ("Slots", 2)}


def growth_curves(results: dict[str, Any], path: Path) -> None:
    """Write the picture, if the grids have been measured."""
    if "grids" in results:
        write_atomically(path, png(draw, results["grids"]["result"], LIGHT))


def draw(result: Mapping[str, Any], theme: Theme) -> Figure:
    """Four panels: milliseconds above, megabytes below; tokens left, slots right."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (grid, (label, power)) in enumerate(OVER.items()):
        for name, (title, style) in LINES.items():
            rows = [row for row in result[grid]["rows"] if row["name"] == name and row["backward"]]
            if not rows:
                continue
            sizes = [row["size"] ** power for row in rows]
            line = style | {"color": theme.memory if name == "fwpkm" else theme.control}
            times = [1e3 * row["seconds"] for row in rows]
            panels[0, column].plot(sizes, times, label=title if column == 0 else None, **line)
            low, high = ([1e3 * row["quartiles"][side] for row in rows] for side in (0, 1))
            panels[0, column].fill_between(sizes, low, high, color=line["color"], alpha=0.18, linewidth=0)
            known = [
                (size, row["peak_bytes"] / 1e6) for size, row in zip(sizes, rows, strict=True) if row["peak_bytes"]
            ]
            if known:
                panels[1, column].plot(*zip(*known, strict=True), **line)
        for panel in panels[:, column]:
            _logarithmic(panel, [row["size"] ** power for row in result[grid]["rows"]])
        panels[1, column].set_xlabel(label)
    panels[0, 0].set_ylabel("Forward + backward, ms")
    panels[1, 0].set_ylabel("Peak beyond the inputs, MB")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _logarithmic(panel: Axes, sizes: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:,g}")
    ticks = sorted(set(sizes))
    panel.set_xticks(ticks, [length_label(size) for size in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
