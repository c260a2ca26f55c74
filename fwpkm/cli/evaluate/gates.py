"""``fwpkm eval gates``."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from fwpkm.cli.evaluate.run import Column, Evaluation, Figures, Out, Seed, Settings, check_numbers
from fwpkm.cli.evaluate.texts import NAMES, checksum_of, filler, read_texts
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.data.codec import TokenArray
from fwpkm.data.questions import secret_numbers
from fwpkm.evaluation.gates import gates as measure
from fwpkm.evaluation.perplexity import side_by_side
from fwpkm.progress import Progress, counter
from fwpkm.report.evaluation import draw_gates

SPACING = 512  # bytes of text for each needle


def gates(
    checkpoint: Checkpoint,
    text: Annotated[
        list[str], typer.Option(help=f"needles (facts in code), random (tokens), {NAMES}; may be repeated.")
    ] = ["code", "help", "needles", "random"],  # noqa: B006
    column: Column = "text",
    tokens: Annotated[int, typer.Option(help="Tokens to read of each, at most.")] = 1 << 16,
    rows: Annotated[int, typer.Option(help="Pieces of it that are read side by side.")] = 4,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """How much of different texts the memories store: histograms of the gates of each layer."""
    EVALUATION.run(checkpoint, out, text=text, column=column, tokens=tokens, rows=rows, seed=seed)


def _measure(subject: Subject, progress: Progress, settings: Settings) -> Figures:
    check_numbers(settings, "tokens", "rows")
    texts = []
    for name in settings["text"]:
        read = _tokens(subject, name, settings)
        pieces = side_by_side(read[: settings["tokens"]], settings["rows"])
        layers = measure(subject.model, pieces, on_tokens=counter(progress, name, pieces.numel()))
        read = read[: pieces.numel()]
        texts.append({"name": name, "tokens": read.size, "checksum": checksum_of(read), "layers": layers})
    return {"texts": texts}


def _tokens(subject: Subject, name: str, settings: Settings) -> TokenArray:
    rng, count = np.random.default_rng(settings["seed"]), settings["tokens"]
    if name == "random":
        drawn: TokenArray = rng.integers(0, subject.codec.vocab_size, count).astype(subject.codec.dtype)
        return drawn
    if name == "needles":
        made = secret_numbers(filler("code", "text"), rng, count, max(1, count // SPACING))
        return subject.codec.encode(made.text)
    return read_texts([name], settings["column"], subject.codec).tokens


def _table(figures: Figures) -> Table:
    blocks = [layer["block"] for layer in figures["texts"][0]["layers"]]
    table = Table("Text", "Tokens", *(f"Block {block}: mean gate" for block in blocks), title="Gates")
    for text in figures["texts"]:
        table.add_row(text["name"], f"{text['tokens']:,}", *(f"{layer['mean']:.4f}" for layer in text["layers"]))
    return table


EVALUATION = Evaluation("gates", _measure, _table, draw_gates)
