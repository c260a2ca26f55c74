"""The ``fwpkm`` command."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from fwpkm import demo as demos
from fwpkm import variants as comparisons
from fwpkm.report.results import Results
from fwpkm.report.table import COLUMNS, recall_rows

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fast-weight Product Key Memory.")
console = Console()

Out = Annotated[Path, typer.Option(help="Folder for results; an interrupted run goes on from what is there.")]
Text = Annotated[Path | None, typer.Option(help="Text file or folder to use instead of Python's standard library.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
DEFAULT = demos.DemoSettings()


@app.command()
def demo(out: Out = Path("out/demo"), text: Text = None, steps: Steps = DEFAULT.training.steps) -> None:
    """Train a small model with a memory and one without, and ask both for numbers up to a megabyte back."""
    settings = dataclasses.replace(DEFAULT, training=dataclasses.replace(DEFAULT.training, steps=steps))
    with _errors_in_one_line(), _progress() as progress:
        results = demos.run(out, settings, text, _command(), progress)
    console.print(_recall_table(results))
    console.print(f"Checkpoint: {out / 'checkpoint'}\nReport:     {out / 'index.html'}")


@app.command()
def variants(
    out: Out = Path("out/variants"),
    text: Text = None,
    steps: Steps = comparisons.TRAINING.steps,
    workers: Annotated[int, typer.Option(min=1, help="Variants trained side by side, a thread each.")] = 2,
) -> None:
    """Train the demo's model with every key update, write scale and width of the query convolution, and compare."""
    settings = dataclasses.replace(DEFAULT, training=dataclasses.replace(comparisons.TRAINING, steps=steps))
    with _errors_in_one_line(), _progress() as progress:
        rows = comparisons.run(out, settings, text, _command(), workers, progress)
    console.print(Markdown(comparisons.markdown(rows)))


def _recall_table(results: Results) -> Table:
    """What fits a terminal of the page's table."""
    table = Table("Text", "Facts", "Questions", "With memory", "Without", title="All six digits right")
    for length, *cells in recall_rows(results):
        row = dict(zip(COLUMNS, cells, strict=True))
        exact = [row[model, "Exact match (bound)"] for model in ("With memory", "Without memory")]
        table.add_row(length, row["Asked", "Facts a text"], row["Asked", "Questions"], *exact)
    return table


def _command() -> str:
    return shlex.join(["fwpkm", *sys.argv[1:]])


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What a user can mend is said in one line; everything else is a fault of ours and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"fwpkm: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from None


@contextmanager
def _progress() -> Iterator[demos.Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    transformers_logging.disable_progress_bar()  # its bars for loading weights would run through ours
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            name = what.split(":", 1)[0]
            if name not in tasks:
                tasks[name] = bars.add_task(what, total=total)
            bars.update(tasks[name], description=what, completed=done, total=total)

        yield show
