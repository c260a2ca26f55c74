"""``fwpkm export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwpkm import compile as compiling
from fwpkm.cli.console import console, errors_in_one_line
from fwpkm.cli.subject import Checkpoint, Subject


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write, which must not exist.")],
    batch: Annotated[int, typer.Option(help="Sequences that a step reads side by side.")] = 1,
    capacity: Annotated[int, typer.Option(help="Tokens of a sequence for which a state has room.")] = 4096,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence that a program reads at once, at most: a chunk and one.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled/--program-only", help="Also compile it, with a C++ compiler.")
    ] = True,
) -> None:
    """Write a model's inference step as a program that torch and the operators run, without the model's code."""
    with errors_in_one_line():
        compiling.export(Subject.load(checkpoint).model, out, batch, capacity, max_length, compiled)
    console.print(f"Exported: {out}")
