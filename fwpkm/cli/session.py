"""``fwpkm read`` and ``fwpkm ask``: a memory on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fwpkm.checks import require
from fwpkm.cli.console import console, errors_in_one_line
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.session import Session

Folder = Annotated[Path, typer.Argument(help="Folder of the session.")]


def read(
    checkpoint: Checkpoint,
    session: Folder,
    files: Annotated[list[Path], typer.Argument(help="Texts to read, in this order.")],
    passes: Annotated[int, typer.Option(help="How often each is read.")] = 1,
) -> None:
    """Read files into a session, a new one unless it is there. It is saved when all have been read."""
    with errors_in_one_line():
        require(passes >= 1, "passes", passes, "a positive integer")
        texts = [file.read_bytes() for file in files]
        for file, text in zip(files, texts, strict=True):
            require(bool(text), str(file), "empty", "a text")
        model, codec, _ = Subject.load(checkpoint)
        reader = Session.load(session, model, codec) if session.exists() else Session(model, codec)
        table = Table("Document", "Bytes", "Tokens", "Passes", "Seconds", title=f"Read into {session}")
        for file, text in zip(files, texts, strict=True):
            started = time.perf_counter()
            reader.read(text, passes, str(file))
            seconds = time.perf_counter() - started
            tokens = reader.readings[-1].tokens
            table.add_row(str(file), f"{len(text):,}", f"{tokens:,}", str(passes), f"{seconds:.1f}")
        size = reader.save(session)
    console.print(table)
    known = sum(reading.tokens for reading in reader.readings)
    console.print(f"Documents known: {len(reader.documents):,}. Tokens read: {known:,}. Bytes on disk: {size:,}.")


def ask(
    checkpoint: Checkpoint,
    session: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 64,
) -> None:
    """Go on with a text by what a session has read. The session stays as it is."""
    with errors_in_one_line():
        model, codec, _ = Subject.load(checkpoint)
        reader = Session.load(session, model, codec)
        started = time.perf_counter()
        answer = reader.ask(prompt, tokens)
        seconds = time.perf_counter() - started
    print(answer)
    console.print(f"{seconds:.1f} seconds. Documents known: {len(reader.documents):,}.", style="dim")
