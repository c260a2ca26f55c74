"""Measure the CPU path: ``python -m benchmarks.cpu``; nothing is timed that has not been compared before."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fwpkm
from benchmarks import check, decode, peak, plots, released, roofline, subjects, tables, timing, work
from benchmarks.cases import Case, safe_inputs, without_near_ties
from benchmarks.subjects import MEMORIES, Memory
from fwpkm.checks import require
from fwpkm.cli.console import console
from fwpkm.demo import machine
from fwpkm.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "cpu.json"
SECTIONS = ("paper", "grids", "decode", "prefill", "parts")
GRIDS = ("tokens", "n_subkeys", "batch", "topk", "value_dim")
AGAINST_OTHERS = ("tokens", "n_subkeys")  # grids that the plain composition is measured on, and memory

PAPER = Case()
GRID = Case(n_subkeys=128, key_dim=128, value_dim=128)
DECODE = Case(value_dim=128, key_update="slow")
PREFILL = Case(tokens=1 << 20, n_subkeys=128, key_dim=64, value_dim=64, key_update="slow")

Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run measures. The defaults are the committed run's."""

    paper: Case = PAPER
    grid: Case = GRID
    grids: tuple[tuple[int, ...], ...] = (
        (512, 1024, 2048, 4096, 8192, 16384),
        (64, 128, 256, 512, 1024),
        (1, 4, 16),
        (2, 8, 32),
        (64, 128, 256, 512),
    )
    repeats: int = 9
    slow_repeats: int = 3  # of what takes seconds
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
    grids=((64, 128, 256), (8, 16, 32), (1, 2), (2, 4), (8, 16)),
    repeats=3,
    slow_repeats=2,
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
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that everything runs.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    out: Annotated[
        Path, typer.Option(help="JSON file; sections that are not measured stay as they are there.")
    ] = RESULTS,
) -> None:
    """Compare with the reference, measure, and write a JSON file, a picture and the tables of the documentation.

    The documentation's files are written for the committed JSON file only.
    """
    prepare(only, SECTIONS, quick and out == RESULTS, threads)
    wanted = (*only, *(["parts"] if parts else [])) or SECTIONS
    run(QUICK if quick else Settings(), wanted, out)
    results = json.loads(out.read_text())
    console.print(tables.everything(results), markup=False, highlight=False, soft_wrap=True)
    plots.growth_curves(results, plots.IMAGE if out == RESULTS else out.with_suffix(".png"))
    if out == RESULTS:
        tables.update(results)


def run(settings: Settings, sections: tuple[str, ...], out: Path, memories: Mapping[str, Memory] = MEMORIES) -> None:
    """Measure sections and put them into ``out``, each as soon as it is complete.

    Raises:
        WrongResultError: if something to be measured is wrong; its section is then not written.
    """
    check.check_plain()
    measures = {
        "paper": lambda: paper(settings, memories),
        "grids": lambda: grids(settings, memories),
        "decode": lambda: decode.decode(settings.decode, settings.contexts, settings.batches, settings.decode_tokens),
        "prefill": lambda: prefill(settings),
        "parts": lambda: parts_of(settings, memories),
    }
    measure_into(out, {section: measures[section] for section in SECTIONS if section in sections}, "benchmarks.cpu")


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


def paper(settings: Settings, memories: Mapping[str, Memory]) -> Results:
    """Function, layer, plain composition, released code and package at the paper's size."""
    case = settings.paper
    inputs, redrawn = safe_inputs(case)
    errors = check.check_memories(case, inputs, memories)
    module, hidden = subjects.layer(case), subjects.layer_hidden(case)
    hidden, _ = without_near_ties(case, hidden, module.keys, lambda x: subjects.layer_query(module, x))
    errors["layer"] = check.check_layer(case, module, hidden)

    quick = {
        "fwpkm": subjects.memory_run(memories["fwpkm"], inputs, case),
        "layer": subjects.module_run(module, hidden),
    }
    slow = {"plain": subjects.memory_run(memories["plain"], inputs, case)}
    if released.folder():
        errors["released"] = check.check_released(case, inputs)
        slow["released"] = subjects.released_run(inputs, case)
    reference_machine = timing.Machine(settings.copy_megabytes)
    runs: dict[str, timing.Run] = {}
    for name, subject in quick.items():
        runs |= {f"{name} forward": _of(subject, False), f"{name} backward": _of(subject, True)}
    slow_runs = {f"{name} {what}": _of(subject, what == "backward") for name, subject in slow.items() for what in _WHAT}
    package = subjects.package_release()
    packaged: dict[str, timing.Run] = {}
    if package:
        packaged["package forward"] = _of(subjects.subject("package", case), False)
    seconds: dict[str, list[float]] = {}
    for i in range(settings.slow_repeats):  # a slow one between two bursts of the quick ones
        now = slow_runs if i == 0 else slow_runs | packaged  # the slowest of all once less
        _extend(seconds, timing.interleaved(now, 1, warm_up=False))
        fast_runs = reference_machine.runs() | runs
        _extend(seconds, timing.interleaved(fast_runs, -(-settings.repeats // settings.slow_repeats)))
    rates = reference_machine.rates(seconds)
    measured = []
    for name in (*quick, *slow, *(["package"] if package else [])):
        for what in _WHAT:
            if f"{name} {what}" not in seconds:
                continue
            backward = what == "backward"
            row: Results = {"name": name, "backward": backward} | timing.summary(seconds[f"{name} {what}"])
            if name in MEMORIES or name == "released":
                row |= _rates(case, backward, row["seconds"])
            row["over_fwpkm"] = row["seconds"] / statistics.median(seconds[f"fwpkm {what}"])
            measured.append(row | {"peak_bytes": peak.peak_bytes(name, case, backward)})
    return {
        "case": dataclasses.asdict(case),
        "hidden_size": subjects.HIDDEN,
        "redrawn": redrawn,
        "errors": errors,
        "machine_rates": rates,
        "package": package,
        "rows": measured,
    }


_WHAT = ("forward", "backward")


def _of(run: subjects.Run, backward: bool) -> timing.Run:
    return lambda: run(backward)


def _extend(seconds: dict[str, list[float]], more: Mapping[str, list[float]]) -> None:
    for name, values in more.items():
        seconds.setdefault(name, []).extend(values)


def _rates(case: Case, backward: bool, seconds: float) -> Results:
    moved, operations = work.total(case, backward)
    return {
        "bytes": moved,
        "flops": operations,
        "gb_per_second": moved / seconds / 1e9,
        "gflop_per_second": operations / seconds / 1e9,
    }


def grids(settings: Settings, memories: Mapping[str, Memory]) -> Results:
    """Time, and over tokens and slots memory, along one size at a time; all sizes of a grid interleaved."""
    found: Results = {"case": dataclasses.asdict(settings.grid)}
    for name, sizes in zip(GRIDS, settings.grids, strict=True):
        others = name in AGAINST_OTHERS
        compared = ("fwpkm", "plain") if others else ("fwpkm",)
        subjects_of = (*compared, "released") if others and released.folder() else compared
        cases = {size: _resized(settings.grid, name, size) for size in sizes}
        runs: dict[str, timing.Run] = {}
        slow: dict[str, timing.Run] = {}
        for size, case in cases.items():
            inputs, _ = safe_inputs(case)
            check.check_memories(case, inputs, {subject: memories[subject] for subject in compared})
            for subject in subjects_of:
                if subject == "released":
                    check.check_released(case, inputs)
                    run_it = subjects.released_run(inputs, case)
                else:
                    run_it = subjects.memory_run(memories[subject], inputs, case)
                into = runs if subject == "fwpkm" else slow
                into |= {f"{subject} {size} {what}": _of(run_it, what == "backward") for what in _WHAT}
        seconds = timing.interleaved(runs, settings.repeats) | timing.interleaved(
            slow, settings.slow_repeats, warm_up=False
        )
        rows = []
        for subject in subjects_of:
            for what in _WHAT:
                for size, case in cases.items():
                    backward = what == "backward"
                    row: Results = {"name": subject, "size": size, "backward": backward}
                    row |= timing.summary(seconds[f"{subject} {size} {what}"])
                    row |= _rates(case, backward, row["seconds"])
                    if others and backward:
                        row["peak_bytes"] = peak.peak_bytes(subject, case, backward)
                    rows.append(row)
        found[name] = {"rows": rows, "growth": _growth(name, rows) if others else []}
    return found


def _resized(case: Case, name: str, size: int) -> Case:
    changes: Results = {name: size}
    return dataclasses.replace(case, **changes)


def _growth(grid: str, rows: list[Results]) -> list[Results]:
    """Exponents over tokens, or over slots, of seconds and bytes."""
    power = 2 if grid == "n_subkeys" else 1
    found = []
    for name in sorted({row["name"] for row in rows}):
        for backward in (False, True):
            some = [row for row in rows if (row["name"], row["backward"]) == (name, backward)]
            sizes = [row["size"] ** power for row in some]
            peaks = [row["peak_bytes"] for row in some if row.get("peak_bytes")]
            found.append(
                {
                    "name": name,
                    "backward": backward,
                    "seconds": timing.growth(sizes, [row["seconds"] for row in some]),
                    "peak_bytes": timing.growth(sizes, peaks) if len(peaks) == len(sizes) else None,
                    "largest_over_smallest": some[-1]["seconds"] / some[0]["seconds"],
                }
            )
    return found


def prefill(settings: Settings) -> Results:
    """A long text in pieces; the first few compared."""
    checked = dataclasses.replace(settings.prefill, tokens=settings.checked_pieces * settings.piece)
    errors = decode.check_pieces(checked, settings.piece)
    return decode.prefill(settings.prefill, settings.piece) | {"errors": errors}


def parts_of(settings: Settings, memories: Mapping[str, Memory]) -> Results:
    """The roofline of each part at the paper's size."""
    inputs, _ = safe_inputs(settings.paper)
    check.check_memories(settings.paper, inputs, {"fwpkm": memories["fwpkm"]})
    return roofline.measure(settings.paper, inputs, settings.repeats, timing.Machine(settings.copy_megabytes))


if __name__ == "__main__":
    typer.run(main)
