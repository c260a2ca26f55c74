"""The tables of ``results/demo.json`` and ``results/baselines.json``."""

from __future__ import annotations

from benchmarks.markdown import measured_on
from benchmarks.running import Results
from fwpkm.report.baselines import baselines_table
from fwpkm.report.table import markdown_table


def recall(results: Results) -> str:
    """What the demo's models recalled."""
    return f"{markdown_table(results)}\n{measured_on(results)}.\n"


def baselines(results: Results) -> str:
    """The demo's model with other memories, other options and none."""
    return f"{baselines_table(results['rows'])}\n\n{measured_on(results)}.\n"
