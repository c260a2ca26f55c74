"""``fwpkm demo`` and ``fwpkm baselines``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.table import Table

from fwpkm import demo as demos
from fwpkm.baselines import comparison
from fwpkm.cli.console import command_line, console, errors_in_one_line, progress_bars
from fwpkm.report.baselines import baselines_table
from fwpkm.report.results import Results
from fwpkm.report.table import COLUMNS, recall_rows

Out = Annotated[Path, typer.Option(help="Folder for results; an interrupted run goes on from what is there.")]
Text = Annotated[Path | None, typer.Option(help="Text file or folder to use instead of Python's standard library.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
DEFAULT = demos.DemoSettings()


def demo(out: Out = Path("out/demo"), text: Text = None, steps: Steps = DEFAULT.training.steps) -> None:
    """Train a small model with a memory and one without, and ask both for numbers up to a megabyte back.

    Takes about ten minutes on two cores.
    """
    settings = dataclasses.replace(DEFAULT, training=dataclasses.replace(DEFAULT.training, steps=steps))
    with errors_in_one_line(), progress_bars() as progress:
        results = demos.run(out, settings, text, command_line(), progress)
    console.print(_recall_table(results))
    console.print(f"Checkpoint: {out / 'checkpoint'}\nReport:     {out / 'index.html'}")


def baselines(
    out: Out = Path("out/baselines"),
    text: Text = None,
    steps: Steps = comparison.SETTINGS.training.steps,
    workers: Annotated[int, typer.Option(min=1, help="Models trained side by side, a thread each.")] = 2,
) -> None:
    """Train the demo's model with other memories, without one and with other options, and compare.

    Takes about half an hour on two cores.
    """
    training = dataclasses.replace(comparison.SETTINGS.training, steps=steps)
    settings = dataclasses.replace(comparison.SETTINGS, training=training)
    with errors_in_one_line(), progress_bars() as progress:
        results = comparison.run(out, settings, text, command_line(), workers, progress)
    console.print(Markdown(baselines_table(results["rows"])))
    console.print(f"Results: {out / 'baselines.json'}\nPicture: {out / 'baselines.png'}")


def _recall_table(results: Results) -> Table:
    """What fits a terminal of the page's table."""
    table = Table("Text", "Facts", "Questions", "With memory", "Without", title="All six digits right")
    for length, *cells in recall_rows(results):
        row = dict(zip(COLUMNS, cells, strict=True))
        exact = [row[model, "Exact match (bound)"] for model in ("With memory", "Without memory")]
        table.add_row(length, row["Asked", "Facts a text"], row["Asked", "Questions"], *exact)
    return table
