"""``fwpkm inspect``."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated

import typer

import fwpkm
from fwpkm.checks import require
from fwpkm.cli.console import command_line, console, errors_in_one_line, progress_bars
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.evaluation.inspection import inspect as look
from fwpkm.progress import counter
from fwpkm.report.inspect_page import write_inspect_page


def inspect(
    checkpoint: Checkpoint,
    file: Annotated[Path, typer.Argument(help="Text to read.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("out/inspect.html"),
    tokens: Annotated[int, typer.Option(help="Tokens to read, at most.")] = 1 << 15,
) -> None:
    """Read a text, and show what its tokens recalled from the memories, and from where, on one HTML page."""
    with errors_in_one_line(), progress_bars() as progress:
        require(tokens >= 1, "tokens", tokens, "a positive integer")
        text = file.read_bytes()
        require(bool(text), str(file), "empty", "a text")
        model, codec, _ = Subject.load(checkpoint)
        inspection = look(model, text, codec, tokens, on_tokens=counter(progress, "reading", tokens))
        progress("reading", tokens, tokens)
        facts = {
            "text": file,
            "tokens": f"{len(inspection.texts):,}",
            "model": checkpoint,
            "command": command_line(),
            "version": fwpkm.__version__,
            "date": date.today().isoformat(),
        }
        write_inspect_page(inspection, out, facts)
    console.print(f"{len(inspection.texts):,} tokens read. Page: {out} ({out.stat().st_size:,} bytes)")
