"""The picture of growth: time, memory and state over tokens, slots and sequences, ours and the others'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fwpkm.report.labels import length_label
from fwpkm.report.plots import write_picture
from fwpkm.report.theme import Theme

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "peers.png"
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "fwpkm": ("fast_weight_memory", {"linestyle": "-", "marker": "o", "zorder": 4}),
    "plain": ("plain PyTorch", {"linestyle": (0, (5, 2)), "marker": "s", "zorder": 3}),
    "released": ("released code", {"linestyle": (0, (1, 1.5)), "marker": "^", "zorder": 2}),
    "package": ("published package", {"linestyle": (0, (4, 1.5, 1, 1.5)), "marker": "D", "zorder": 2}),
}
OVER = {"tokens": ("Tokens", 1), "n_subkeys": ("Slots", 2), "batch": ("Sequences", 1)}
COSTS = {
    "seconds": ("Forward + backward, ms", 1e3),
    "peak_bytes": ("Peak beyond the inputs, MB", 1e-6),
    "state_bytes": ("State of a sequence, MB", 1e-6),
}


def growth_curves(results: dict[str, Any], path: Path) -> None:
    """Write the picture, if any grid has been measured."""
    if any(grid in results for grid in OVER):
        write_picture(draw, results, path)


def draw(results: Mapping[str, Any], theme: Theme) -> Figure:
    """A column for each of tokens, slots and sequences; milliseconds, megabytes of the peak and of the state."""
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    panels = figure.subplots(len(COSTS), len(OVER), sharex="col", sharey="row")
    lines = {}
    for column, (grid, (label, power)) in enumerate(OVER.items()):
        measured = results[grid]["result"]["rows"] if grid in results else []
        rows = [row for row in measured if row["backward"]]
        for name, (title, style) in LINES.items():
            line = style | {"color": theme.memory if name == "fwpkm" else theme.control}
            for panel, (key, (_, factor)) in zip(panels[:, column], COSTS.items(), strict=True):
                found = [row for row in rows if row["name"] == name and row.get(key)]
                if found:
                    sizes, costs = ([row["size"] ** power for row in found], [factor * row[key] for row in found])
                    (lines[title],) = panel.plot(sizes, costs, **line)
                if found and key == "seconds":
                    low, high = ([factor * row["quartiles"][side] for row in found] for side in (0, 1))
                    panel.fill_between(sizes, low, high, color=line["color"], alpha=0.18, linewidth=0)
        for panel in panels[:, column]:
            _logarithmic(panel, [row["size"] ** power for row in rows])
        panels[-1, column].set_xlabel(label)
    for panel, (label, _) in zip(panels[:, 0], COSTS.values(), strict=True):
        panel.set_ylabel(label)
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=4)
    return figure


def _logarithmic(panel: Axes, sizes: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:,g}")
    ticks = sorted(set(sizes))
    panel.set_xticks(ticks, [length_label(size) for size in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
