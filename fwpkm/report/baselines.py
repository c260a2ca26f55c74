"""The comparison of baselines as a table and as a picture; rows are those of :mod:`fwpkm.baselines.comparison`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from fwpkm.report.labels import bounded, count, length_label
from fwpkm.report.theme import Theme

Rows = Sequence[Mapping[str, Any]]


def baselines_table(rows: Rows) -> str:
    """One line a model, as Markdown."""
    first = rows[0]
    head = [
        "Model",
        f"Nats a byte at {length_label(first['text']['length'])}",
        *(f"Recall at {length_label(int(length))}" for length in first["recall"]),
        "Training bytes/CPU s",
        "Parameters",
        f"State at {length_label(first['state']['length'])}, KB",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        lines.append(
            [
                row["name"],
                f"{row['text']['nats_per_byte']:.3f}",
                *map(bounded, row["recall"].values()),
                count(row["training"]["tokens_per_cpu_second"]),
                count(row["parameters"]),
                count(row["state"]["bytes"] / 1e3),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_baselines(results: Mapping[str, Any], theme: Theme) -> Figure:
    """Five panels side by side, a row a model; those with an FwPKM have the memory's colour."""
    rows: Rows = results["rows"][::-1]  # bars are drawn from below
    names = [row["name"] for row in rows]
    colours = [theme.memory if name.startswith("FwPKM") else theme.control for name in names]
    longest = max(rows[0]["recall"], key=int)
    recall = [row["recall"][longest] for row in rows]
    text, state = rows[0]["text"]["length"], rows[0]["state"]["length"]
    figure = Figure(figsize=(15, 1.6 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 5, sharey=True)
    titles = (
        f"Nats a byte at {length_label(text)}",
        f"Recall at {length_label(int(longest))}",
        "Training, bytes/CPU s",
        "Parameters",
        f"State at {length_label(state)}, bytes",
    )
    columns = (
        [row["text"]["nats_per_byte"] for row in rows],
        [share["exact"] for share in recall],
        [row["training"]["tokens_per_cpu_second"] for row in rows],
        [row["parameters"] for row in rows],
        [row["state"]["bytes"] for row in rows],
    )
    for panel, title, column in zip(panels, titles, columns, strict=True):
        panel.set_title(title)
        panel.tick_params(axis="y", length=0)
        if title.startswith(("Recall", "Training")):  # from nothing to all: a bar
            panel.barh(names, column, color=colours, height=0.7)
            panel.grid(False, axis="y")
        else:
            panel.scatter(column, names, color=colours, zorder=3)
    panels[1].plot([share["exact_lower95"] for share in recall], names, "|", color=theme.ink, markersize=9)
    panels[1].set_xlim(0, 1)
    panels[1].xaxis.set_major_formatter(PercentFormatter(1, 0))
    panels[2].xaxis.set_major_formatter("{x:,.0f}")
    panels[2].xaxis.set_major_locator(MaxNLocator(2))
    for panel, column in zip(panels[3:], columns[3:], strict=True):
        panel.set_xscale("log")
        panel.set_xlim(10 ** math.floor(math.log10(min(column))), 10 ** math.ceil(math.log10(max(column))))
        panel.xaxis.set_minor_formatter(NullFormatter())
    return figure
