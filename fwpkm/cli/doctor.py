"""``fwpkm doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fwpkm.checks import require
from fwpkm.cli.console import console, errors_in_one_line
from fwpkm.compile import audit, environment
from fwpkm.models import FwPKMForCausalLM, presets
from fwpkm.training import checkpoint

BATCH = 2  # torch.compile treats a batch of one as a shape of its own


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help=f"Model to audit: its folder, that of a training, or {' or '.join(presets.PRESETS)}."),
    ] = None,
    length: Annotated[list[int], typer.Option(help="Tokens of an input; may be repeated.")] = [64],  # noqa: B006
    training: Annotated[bool, typer.Option("--training", help="Audit training steps instead of reading.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Compile for good; compare time and memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is installed and what will run, and what torch.compile makes of a model.

    Ends with 1 if a graph breaks, a large tensor is copied, or an operator lacks a fake or a backward.
    """
    with errors_in_one_line():
        require(all(x >= 1 for x in length), "length", min(length), "a positive integer")
        found = environment()
        result = None if model is None else audit(*_model(model, length, training), training, measure)
    if as_json:
        print(json.dumps({"environment": found.to_json(), "audit": result and result.to_json()}, indent=1))
    else:
        console.print(found.table())
        if result is not None:
            console.print(result.table())
    if result is not None and not result.clean:
        raise typer.Exit(1)


def _model(name: str, lengths: list[int], training: bool) -> tuple[FwPKMForCausalLM, list[dict[str, Any]]]:
    """The model, and random tokens of those lengths."""
    if name in presets.PRESETS:
        model = FwPKMForCausalLM(presets.preset(name))
    else:
        model = FwPKMForCausalLM.from_pretrained(checkpoint.find(Path(name)))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(model.config.vocab_size, (BATCH, x), generator=generator) for x in lengths]
    inputs = [{"input_ids": x.to(model.device)} for x in tokens]
    return model, [x | {"labels": x["input_ids"]} if training else x for x in inputs]
