"""Measure our CPU path alone: ``python -m benchmarks.cpu``; nothing is timed that has not been compared before."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import check, decode, roofline, running, subjects, tables, timing, work
from benchmarks.cases import Case, safe_inputs
from benchmarks.running import Results
from benchmarks.subjects import MEMORIES, Make
from fwpkm.cli.console import console

RESULTS = Path(__file__).parent / "results" / "cpu.json"
SECTIONS = ("grids", "decode", "prefill", "parts")
GRIDS = ("topk", "value_dim")  # benchmarks/peers.py has tokens, slots and batch

PAPER = Case()
GRID = Case(n_subkeys=128, key_dim=128, value_dim=128)
DECODE = Case(value_dim=128, key_update="slow")
PREFILL = Case(tokens=1 << 20, n_subkeys=128, key_dim=64, value_dim=64, key_update="slow")


@dataclass(frozen=True)
class Settings:
    """What a run measures. The defaults are the committed run's."""

    paper: Case = PAPER
    grid: Case = GRID
    grids: tuple[tuple[int, ...], ...] = ((2, 8, 32), (64, 128, 256, 512))
    repeats: int = 9
    decode: Case = DECODE
    contexts: tuple[int, ...] = (1 << 10, 1 << 13, 1 << 15, 1 << 17)
    batches: tuple[int, ...] = (1, 16)
    decode_tokens: int = 24
    prefill: Case = PREFILL
    piece: int = 4096
    checked_pieces: int = 4
    copy_megabytes: int = 256


QUICK = Settings(
    paper=Case(tokens=256, n_subkeys=32, key_dim=32, value_dim=32, chunk=64),
    grid=Case(tokens=128, n_subkeys=16, key_dim=16, value_dim=16, chunk=64),
    grids=((2, 4), (8, 16)),
    repeats=3,
    decode=Case(n_subkeys=32, key_dim=16, value_dim=16, chunk=64, key_update="slow"),
    contexts=(64, 256),
    batches=(1, 2),
    decode_tokens=3,
    prefill=Case(tokens=4096, n_subkeys=16, key_dim=16, value_dim=16, chunk=64, key_update="slow"),
    piece=256,
    checked_pieces=2,
    copy_megabytes=8,
)


def main(
    only: Annotated[list[str], typer.Option(help=f"Section to measure: {', '.join(SECTIONS)}; may be repeated.")] = [],  # noqa: B006
    parts: Annotated[bool, typer.Option("--parts", help="The same as --only parts: the roofline table.")] = False,
    quick: running.Quick = False,
    threads: running.Threads = 2,
    out: running.Out = RESULTS,
) -> None:
    """Compare with the reference, measure, and write a JSON file and the tables of the documentation.

    The documentation's files are written for the committed JSON file only.
    """
    running.prepare(only, SECTIONS, quick and out == RESULTS, threads)
    wanted = (*only, *(["parts"] if parts else [])) or SECTIONS
    run(QUICK if quick else Settings(), wanted, out)
    results = json.loads(out.read_text())
    console.print(tables.everything("cpu", results), markup=False, highlight=False, soft_wrap=True)
    if out == RESULTS:
        tables.update()


def run(settings: Settings, sections: tuple[str, ...], out: Path, made: Make = MEMORIES["fwpkm"]) -> None:
    """Measure sections and put them into ``out``, each as soon as it is complete.

    Raises:
        WrongResultError: if something to be measured is wrong; its section is then not written.
    """
    check.check_plain()
    measures = {
        "grids": lambda: grids(settings, made),
        "decode": lambda: decode.decode(settings.decode, settings.contexts, settings.batches, settings.decode_tokens),
        "prefill": lambda: prefill(settings),
        "parts": lambda: parts_of(settings, made),
    }
    wanted = {section: measures[section] for section in SECTIONS if section in sections}
    running.measure_into(out, wanted, "benchmarks.cpu")


def grids(settings: Settings, made: Make) -> Results:
    """Time along one size at a time; all sizes of a grid interleaved."""
    found: Results = {"case": dataclasses.asdict(settings.grid)}
    for name, sizes in zip(GRIDS, settings.grids, strict=True):
        cases = {size: _resized(settings.grid, name, size) for size in sizes}
        runs: dict[str, timing.Run] = {}
        for size, case in cases.items():
            inputs, _ = safe_inputs(case)
            check.check_memories(case, inputs, {"fwpkm": made})
            run_it = subjects.memory_run(made(inputs, case), inputs, case)
            runs |= {f"{size} {backward}": partial(run_it, backward) for backward in (False, True)}
        seconds = timing.interleaved(runs, settings.repeats)
        rows = []
        for backward in (False, True):
            for size, case in cases.items():
                row: Results = {"name": "fwpkm", "size": size, "backward": backward}
                row |= timing.summary(seconds[f"{size} {backward}"])
                rows.append(row | work.rates(case, backward, row["seconds"]))
        found[name] = {"rows": rows}
    return found


def _resized(case: Case, name: str, size: int) -> Case:
    changes: Results = {name: size}
    return dataclasses.replace(case, **changes)


def prefill(settings: Settings) -> Results:
    """A long text in pieces; the first few compared."""
    checked = dataclasses.replace(settings.prefill, tokens=settings.checked_pieces * settings.piece)
    errors = decode.check_pieces(checked, settings.piece)
    return decode.prefill(settings.prefill, settings.piece) | {"errors": errors}


def parts_of(settings: Settings, made: Make) -> Results:
    """The roofline of each part at the paper's size."""
    inputs, _ = safe_inputs(settings.paper)
    check.check_memories(settings.paper, inputs, {"fwpkm": made})
    return roofline.measure(settings.paper, inputs, settings.repeats, timing.Machine(settings.copy_megabytes))


if __name__ == "__main__":
    typer.run(main)
