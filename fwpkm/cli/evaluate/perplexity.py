"""``fwpkm eval perplexity``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import typer
from rich.table import Table

from fwpkm.checks import require, require_choice
from fwpkm.cli.evaluate.run import Column, Evaluation, Figures, Out, Settings, check_numbers
from fwpkm.cli.evaluate.texts import NAMES, Text, held_out, read_texts
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.evaluation.memory import never_written
from fwpkm.evaluation.perplexity import by_position, side_by_side, summary, token_losses
from fwpkm.progress import Progress, counter
from fwpkm.report.evaluation import draw_perplexity
from fwpkm.report.labels import MISSING, length_label

MEMORY = ("on", "off", "reset")


def perplexity(
    checkpoint: Checkpoint,
    text: Annotated[
        list[str], typer.Option(help=f"Text: {NAMES}; may be repeated. What the training has held out if none.")
    ] = [],  # noqa: B006
    column: Column = "text",
    tokens: Annotated[int, typer.Option(help="Tokens to read, at most.")] = 1 << 18,
    rows: Annotated[int, typer.Option(help="Pieces of the text that are read side by side.")] = 8,
    memory: Annotated[
        list[str],
        typer.Option(
            help="on: as it is; off: never written, all reads are of the base values; reset: back to the base values "
            "again and again; may be repeated."
        ),
    ] = ["on"],  # noqa: B006
    reset_every: Annotated[
        int,
        typer.Option(help="Tokens between resets; 0: at every document, and all is read in one row."),
    ] = 0,
    out: Out = None,
) -> None:
    """Predict text, in all and by position, with memories on, off, or reset."""
    EVALUATION.run(
        checkpoint, out, text=text, column=column, tokens=tokens, rows=rows, memory=memory, reset_every=reset_every
    )


def _measure(subject: Subject, progress: Progress, settings: Settings) -> Figures:
    require(settings["tokens"] >= 2, "tokens", settings["tokens"], "at least 2")
    check_numbers(settings, "rows")
    require(settings["reset_every"] >= 0, "reset_every", settings["reset_every"], "a positive integer, or 0")
    for memory in settings["memory"]:
        require_choice("memory", memory, MEMORY)
    names = settings["text"]
    whole = read_texts(names, settings["column"], subject.codec) if names else held_out(subject)
    text = whole.first(settings["tokens"])
    by_document = "reset" in settings["memory"] and not settings["reset_every"]
    pieces = side_by_side(text.tokens, 1 if by_document else settings["rows"])
    runs = []
    for memory in settings["memory"]:
        resets = _resets(text, settings["reset_every"]) if memory == "reset" else ()
        model = never_written(subject.model) if memory == "off" else subject.model
        done = counter(progress, f"memory {memory}", pieces.numel() - pieces.shape[0])
        losses = token_losses(model, pieces, on_tokens=done, resets=resets)
        figures = summary(losses, pieces, text.bytes_per_token)
        runs.append({"memory": memory, **figures, "positions": by_position(losses)})
    return {"text": text.about(), "runs": runs}


def _resets(text: Text, every: int) -> Collection[int]:
    if every:
        return range(0, text.tokens.size, every)
    known = text.starts is not None
    require(known, "reset_every", every, "a positive integer: where documents begin is not kept with a training's text")
    return frozenset(text.starts or ())


def _table(figures: Figures) -> Table:
    runs = figures["runs"]
    table = Table(figures["text"]["name"], *(f"memory {run['memory']}" for run in runs), title="Perplexity")
    for name, key, form in (
        ("Tokens", "tokens", ",d"),
        ("Nats a token", "loss", ".4f"),
        ("Nats a byte", "nats_per_byte", ".4f"),
        ("Perplexity a token", "perplexity", ".3f"),
    ):
        table.add_row(name, *(format(run[key], form) for run in runs))
    at = [{x["from"]: x["perplexity"] for x in run["positions"]} for run in runs]
    for first in sorted(set().union(*at)):
        shown = (f"{x[first]:.3f}" if first in x else MISSING for x in at)
        table.add_row(f"from token {length_label(first)} on", *shown)
    return table


EVALUATION = Evaluation("perplexity", _measure, _table, draw_perplexity)
