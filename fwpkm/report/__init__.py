"""Pictures, tables and one page of a demo's results; ``results.py`` says what those are. And those of baselines."""

from fwpkm.report.baselines import baselines_plot, baselines_table
from fwpkm.report.page import write_page
from fwpkm.report.plots import recall_curve, recall_heat_map, training_curve
from fwpkm.report.table import markdown_table

__all__ = [
    "baselines_plot",
    "baselines_table",
    "markdown_table",
    "recall_curve",
    "recall_heat_map",
    "training_curve",
    "write_page",
]
