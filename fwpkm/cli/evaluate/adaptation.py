"""``fwpkm eval adaptation``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from fwpkm.cli.evaluate.run import Column, Evaluation, Figures, Out, Settings
from fwpkm.cli.evaluate.texts import NAMES, read_texts
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.evaluation.adaptation import adaptation as measure
from fwpkm.evaluation.memory import never_written
from fwpkm.progress import Progress, counter
from fwpkm.report.evaluation import draw_adaptation
from fwpkm.report.labels import MISSING


def adaptation(
    checkpoint: Checkpoint,
    a: Annotated[str, typer.Option(help=f"A: {NAMES}.")] = "code",
    b: Annotated[str, typer.Option(help="B, named in the same way.")] = "help",
    column: Column = "text",
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 1 << 14,
    rows: Annotated[int, typer.Option(help="Texts of each domain, read side by side.")] = 4,
    piece: Annotated[int, typer.Option(help="Tokens of a point of the curve.")] = 1 << 10,
    out: Out = None,
) -> None:
    """Read a text of A, one of B, and that of A again: what is learned, and what is kept?"""
    EVALUATION.run(checkpoint, out, a=a, b=b, column=column, length=length, rows=rows, piece=piece)


def _measure(subject: Subject, progress: Progress, settings: Settings) -> Figures:
    need = settings["rows"] * settings["length"]
    a, b = (read_texts([settings[x]], settings["column"], subject.codec).first(need) for x in "ab")
    models = {"on": subject.model}
    if subject.model.config.fwpkm_layers:
        models["off"] = never_written(subject.model)
    runs = []
    for memory, model in models.items():
        done = counter(progress, f"memory {memory}", 5 * need)
        sizes = {x: settings[x] for x in ("length", "rows", "piece")}
        runs.append({"memory": memory, **measure(model, a.tokens, b.tokens, **sizes, on_tokens=done)})
    return {"texts": [a.about(), b.about()], "runs": runs}


def _table(figures: Figures) -> Table:
    a, b = (text["name"] for text in figures["texts"])
    columns = "Memory", "A at first", "A again at once", "A again after B", "Gain", "Kept"
    table = Table(*columns, title=f"Nats a token, A: {a}, B: {b}")
    for run in figures["runs"]:
        kept = MISSING if run["kept"] is None else f"{run['kept']:.1%}"
        losses = (f"{run[x]:.4f}" for x in ("first", "again", "after"))
        table.add_row(run["memory"], *losses, f"{run['first'] - run['again']:z.4f}", kept)
    return table


EVALUATION = Evaluation("adaptation", _measure, _table, draw_adaptation)
