"""``fwpkm inspect``."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer

import fwpkm
from fwpkm.checks import require
from fwpkm.cli.console import command_line, console, errors_in_one_line, progress_bars
from fwpkm.data.codec import Codec
from fwpkm.evaluation.inspection import inspect as look
from fwpkm.models import FwPKMForCausalLM
from fwpkm.report.inspect_page import write_inspect_page
from fwpkm.training import checkpoint as checkpoints


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a model, or of a training: its latest checkpoint.")],
    file: Annotated[Path, typer.Argument(help="Text to read.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("out/inspect.html"),
    tokens: Annotated[int, typer.Option(help="Tokens to read, at most.")] = 1 << 15,
) -> None:
    """Read a text, and show what its tokens recalled from the memories, and from where, on one HTML page."""
    with errors_in_one_line(), progress_bars() as progress:
        require(tokens >= 1, "tokens", tokens, "a positive integer")
        text = file.read_bytes()
        require(bool(text), str(file), "empty", "a text")
        found = checkpoints.find(checkpoint)
        model = FwPKMForCausalLM.from_pretrained(found)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        done = 0

        def count(read: int) -> None:
            nonlocal done
            done += read
            progress("reading", done, tokens)

        inspection = look(model, text, Codec.of_checkpoint(found), tokens, on_tokens=count)
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
