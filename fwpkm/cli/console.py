"""What the commands share: where they print, progress, and errors in one line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fwpkm.progress import Progress

console = Console()


def command_line() -> str:
    """How this command was called."""
    return shlex.join(["fwpkm", *sys.argv[1:]])


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can mend is said in one line; everything else is a fault of ours and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        message = " ".join(text.split())
        Console(stderr=True).print(f"fwpkm: {message}", style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(2) from None


@contextmanager
def progress_bars(visible: bool = True) -> Iterator[Progress]:
    """A bar for everything that is being done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, disable=not visible) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            name = what.split(":", 1)[0]
            if name not in tasks:
                tasks[name] = bars.add_task(what, total=total)
            bars.update(tasks[name], description=what, completed=done, total=total)

        yield show
