"""A picture of a training, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fwpkm.report.theme import Theme


def draw_training(results: Mapping[str, Any], theme: Theme) -> Figure:
    """Two panels over the steps: the loss of training and held-out text; what the memories and gradients do."""
    steps = [record for record in results["records"] if "loss" in record]
    evaluations = [record for record in results["records"] if "held_out_loss" in record]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, other = figure.subplots(1, 2)

    def line(panel: Any, records: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            panel.plot(*zip(*points, strict=True), label=label, **style)

    line(loss, steps, "loss", "training text", color=theme.memory, linewidth=1.2)
    line(loss, evaluations, "held_out_loss", "held-out text", color=theme.control, marker="o")
    loss.set_title("Loss, nats a token")
    line(other, steps, "gradient_norm", "gradient norm", color=theme.faint, linewidth=1.2)
    line(other, steps, "gate", "mean gate", color=theme.right)
    other.set_title("Gradients and gates")
    for panel in (loss, other):
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.set_xlabel("Training step")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside upper left", ncols=4)
    return figure
