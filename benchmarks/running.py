"""How a benchmark is run: its options checked, its sections written as they come, with what they were measured on."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fwpkm
from fwpkm.checks import require
from fwpkm.cli.console import console
from fwpkm.files import write_atomically
from fwpkm.machine import machine

Results = dict[str, Any]

Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that everything runs.")]
Threads = Annotated[int, typer.Option(help="Threads of torch.")]
Out = Annotated[Path, typer.Option(help="JSON file; sections that are not measured stay as they are there.")]


def prepare(only: Sequence[str], sections: Sequence[str], quick_for_documentation: bool, threads: int) -> None:
    """Check what a benchmark was called with, and set torch's threads."""
    for section in only:
        require(section in sections, "--only", section, f"one of {', '.join(sections)}")
    expected = "together with --out: its figures are not for the documentation"
    require(not quick_for_documentation, "--quick", "given", expected)
    torch.set_num_threads(threads)
    # One busy process next to two threads makes small operators several times slower.
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"The machine is not idle (load {load:.1f}): figures will be too high.", style="red")


def measure_into(out: Path, measures: Mapping[str, Callable[[], Any]], module: str) -> None:
    """Measure sections and put them into ``out``, each as soon as it is complete; others stay as they are there."""
    for section, measure in measures.items():
        console.print(f"measuring {section}", style="dim")
        measured = {"where": where(module), "result": measure()}
        results: Results = json.loads(out.read_text()) if out.exists() else {}
        write_atomically(out, json.dumps(results | {section: measured}, indent=1) + "\n")


def where(module: str) -> Results:
    """What a figure was measured on, and when, by which command."""
    return {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "version": fwpkm.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }
