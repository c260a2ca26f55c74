"""``fwpkm eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import fwpkm
from fwpkm.checks import require
from fwpkm.cli.console import command_line, console, errors_in_one_line, progress_bars
from fwpkm.data import tokens as token_files
from fwpkm.data.codec import Codec, TokenArray
from fwpkm.data.text import file_documents, load_split, split_documents, standard_library, text_files
from fwpkm.demo import Questions, documents
from fwpkm.evaluation.perplexity import perplexity as measure
from fwpkm.evaluation.recall import ask
from fwpkm.files import write_atomically
from fwpkm.models import FwPKMForCausalLM
from fwpkm.report.labels import bounded, length_label, percent
from fwpkm.training import checkpoint as checkpoints
from fwpkm.training.loop import Progress

app = typer.Typer(no_args_is_help=True, help="Measure what a model predicts and recalls.")

Checkpoint = Annotated[Path, typer.Argument(help="Folder of a model, or of a training: its latest checkpoint.")]
Out = Annotated[Path | None, typer.Option(help="JSON file for the figures; next to the model unless given.")]


@app.command()
def perplexity(
    checkpoint: Checkpoint,
    text: Annotated[list[Path], typer.Option(help="Text file or folder; may be repeated.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens to read, at most.")] = 1 << 18,
    rows: Annotated[int, typer.Option(help="Pieces of the text that are read side by side.")] = 8,
    out: Out = None,
) -> None:
    """Predict text: what the training has held out, or Python's standard library, unless --text names another."""
    with errors_in_one_line(), progress_bars() as progress:
        require(tokens >= 2, "tokens", tokens, "at least 2")
        require(rows >= 1, "rows", rows, "a positive integer")
        model, codec = _load(checkpoint)
        read, bytes_per_token, name = _text(checkpoint, text, codec)
        total = min(tokens, read.size)
        figures = measure(
            model, read[:total], rows, bytes_per_token=bytes_per_token, on_tokens=_counter(progress, "reading", total)
        )
        path = _write(checkpoint, out, "perplexity", {"text": name, **figures})
    table = Table("Tokens", "Bytes", "Nats a token", "Nats a byte", "Perplexity a token", title=f"Text: {name}")
    table.add_row(
        f"{figures['tokens']:,}",
        f"{figures['bytes']:,}",
        f"{figures['loss']:.4f}",
        f"{figures['nats_per_byte']:.4f}",
        f"{figures['perplexity']:.3f}",
    )
    console.print(table)
    console.print(f"Figures: {path}")


@app.command()
def needles(
    checkpoint: Checkpoint,
    length: Annotated[list[int], typer.Option(help="Bytes a text; may be repeated.")] = [1 << 10, 1 << 12, 1 << 14],  # noqa: B006
    texts: Annotated[int, typer.Option(help="Texts of each length.")] = 16,
    facts: Annotated[int, typer.Option(help="Facts hidden in each text, and asked for at its end.")] = 7,
    text: Annotated[Path | None, typer.Option(help="Text to hide them in; Python's standard library if none.")] = None,
    seed: Annotated[int, typer.Option(help="Draws texts and facts.")] = 0,
    out: Out = None,
) -> None:
    """Ask a byte-level model for six-digit numbers that stand somewhere in long texts."""
    with errors_in_one_line(), progress_bars() as progress:
        for name, value in (("texts", texts), ("facts", facts)):
            require(value >= 1, name, value, "a positive integer")
        require(seed >= 0, "seed", seed, "a number >= 0")
        model, codec = _load(checkpoint)
        require(codec.tokenizer is None, "checkpoint", checkpoint, "a byte-level model: it has a tokenizer")
        _, filler = load_split(text_files(text) if text else standard_library())
        rows = []
        for size in length:
            made = documents(filler, Questions(size, texts, facts), seed)
            done = _counter(progress, f"asking at {size:,} bytes", size * texts)
            rows.append(ask(model, made, on_bytes=done).summary())
        path = _write(checkpoint, out, "needles", {"seed": seed, "recall": rows})
    table = Table("Bytes", "Facts a text", "Questions", "Exact match (bound)", "Digits", "Bytes/s", title="Needles")
    for row in rows:
        asked = f"{row['needles']:,}", f"{row['questions']:,}"
        speed = f"{row['bytes_per_second']:,.0f}"
        table.add_row(length_label(row["length"]), *asked, bounded(row), percent(row["digits"]), speed)
    console.print(table)
    console.print(f"Figures: {path}")


def _load(folder: Path) -> tuple[FwPKMForCausalLM, Codec]:
    found = checkpoints.find(folder)
    model = FwPKMForCausalLM.from_pretrained(found)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), Codec.of_checkpoint(found)


def _text(folder: Path, text: list[Path], codec: Codec) -> tuple[TokenArray, float, str]:
    """The tokens to predict, how many bytes one has, and where they come from."""
    if text:
        documents = file_documents([file for path in text for file in text_files(path)])
        return *token_files.encode(documents, codec), ", ".join(map(str, text))
    for training in (folder, folder.parent.parent):
        if (training / "data" / "tokens.json").exists():
            held = token_files.load(training / "data")
            return held.held_out, held.bytes_per_token, f"held out from {training}"
    _, documents = split_documents(file_documents(standard_library()))
    return *token_files.encode(documents, codec), "held-out part of Python's standard library"


def _counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(what, done, total)

    return count


def _write(folder: Path, out: Path | None, name: str, figures: dict[str, Any]) -> Path:
    path = out or folder / f"{name}.json"
    head = {"version": fwpkm.__version__, "command": command_line(), "checkpoint": str(folder)}
    write_atomically(path, json.dumps(head | figures, indent=1))
    return path
