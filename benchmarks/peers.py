"""Side by side: our memory, a plain composition, the released code, the published package; and reads alone.

``python -m benchmarks.peers``; nothing is timed that has not been compared with the reference before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import check, package, peak, plots, reads, running, states, subjects, tables, timing, work
from benchmarks.cases import Case, safe_inputs, without_near_ties
from benchmarks.running import Results
from benchmarks.subjects import MEMORIES, Make
from fwpkm.cli.console import console

FILE = "peers"
RESULTS = Path(__file__).parent / "results" / f"{FILE}.json"
GRIDS = ("tokens", "n_subkeys", "batch")
SECTIONS = ("paper", *GRIDS, "reads")
PASSES = {False: "forward", True: "forward + backward"}

PAPER = Case()
GRID = Case(n_subkeys=128, key_dim=128, value_dim=128)


@dataclass(frozen=True)
class Settings:
    """What a run measures. The defaults are the committed run's."""

    paper: Case = PAPER
    grid: Case = GRID
    grids: tuple[tuple[int, ...], ...] = (
        (512, 1024, 2048, 4096, 8192, 16384),
        (64, 128, 256, 512, 1024),
        (1, 2, 4, 8),
    )
    reads: tuple[Case, ...] = (
        dataclasses.replace(PAPER, tokens=1),
        Case(tokens=64, n_subkeys=64, value_dim=64),
        dataclasses.replace(PAPER, n_subkeys=64),
        PAPER,
        dataclasses.replace(PAPER, tokens=16384),
    )
    repeats: int = 9  # of what takes less than a second
    memory: int = 12 * 10**9  # what needs more is left out
    patience: float = 5.0  # seconds; of what took longer, larger sizes are left out
    copy_megabytes: int = 256


QUICK = Settings(
    paper=Case(tokens=256, n_subkeys=32, key_dim=32, value_dim=32, chunk=64),
    grid=Case(tokens=128, n_subkeys=16, key_dim=16, value_dim=16, chunk=64),
    grids=((64, 128, 256), (8, 16, 32), (1, 2)),
    reads=(Case(tokens=1, n_subkeys=16, value_dim=8), Case(tokens=64, n_subkeys=16, value_dim=8)),
    repeats=3,
    copy_megabytes=8,
)


def main(
    only: Annotated[list[str], typer.Option(help=f"Section to measure: {', '.join(SECTIONS)}; may be repeated.")] = [],  # noqa: B006
    quick: running.Quick = False,
    threads: running.Threads = 2,
    out: running.Out = RESULTS,
) -> None:
    """Compare with the reference, measure, and write a JSON file, a picture and the tables of the documentation.

    The documentation's files are written for the committed JSON file only.
    """
    running.prepare(only, SECTIONS, quick and out == RESULTS, threads)
    run(QUICK if quick else Settings(), tuple(only) or SECTIONS, out)
    results = json.loads(out.read_text())
    console.print(tables.everything(FILE, results), markup=False, highlight=False, soft_wrap=True)
    plots.growth_curves(results, plots.IMAGE if out == RESULTS else out.with_suffix(".png"))
    if out == RESULTS:
        tables.update()


def run(settings: Settings, sections: Sequence[str], out: Path, memories: Mapping[str, Make] | None = None) -> None:
    """Measure sections and put them into ``out``, each as soon as it is complete; points are printed as they come.

    Raises:
        WrongResultError: if something to be measured is wrong; its section is then not written.
    """
    check.check_plain()
    made = memories or {name: MEMORIES[name] for name in subjects.installed()}
    measures: dict[str, Callable[[], Any]] = {"paper": partial(paper, settings, made)}
    for name, sizes in zip(GRIDS, settings.grids, strict=True):
        measures[name] = partial(grid, settings, name, sizes, made)
    measures["reads"] = lambda: [read(settings, case) for case in settings.reads]
    running.measure_into(out, {name: measures[name] for name in SECTIONS if name in sections}, "benchmarks.peers")


def paper(settings: Settings, memories: Mapping[str, Make]) -> Results:
    """Everyone, and our layer, at the paper's size; and what the machine itself does in the same run."""
    case = settings.paper
    module, hidden = subjects.layer(case), subjects.layer_hidden(case)
    hidden, _ = without_near_ties(case, hidden, module.keys, lambda x: subjects.layer_query(module, x))
    errors = {"layer": check.check_layer(case, module, hidden)}
    reference_machine = timing.Machine(settings.copy_megabytes)
    ours = subjects.module_run(module, hidden)
    others = reference_machine.runs() | {f"layer {what}": partial(ours, kind) for kind, what in PASSES.items()}
    found, seconds = side_by_side(case, settings, memories, {}, others)
    layer = [
        {"name": "layer", "backward": kind}
        | timing.summary(seconds[f"layer {what}"])
        | {"peak_bytes": peak.peak_bytes("layer", case, kind, settings.memory)}
        for kind, what in PASSES.items()
    ]
    rows = [_over_ours(row, [*layer, *found["rows"]]) for row in (*layer, *found["rows"])]
    return (
        _head(case, memories)
        | found
        | {"rows": rows, "errors": errors | found["errors"], "hidden_size": subjects.HIDDEN}
        | {"machine_rates": reference_machine.rates(seconds)}
    )


def grid(settings: Settings, name: str, sizes: Sequence[int], memories: Mapping[str, Make]) -> Results:
    """Everyone along one size."""
    rows: list[Results] = []
    errors: dict[str, check.Errors] = {}
    impatient: dict[tuple[str, bool], str] = {}
    for size in sizes:
        changes: Results = {name: size}
        case = dataclasses.replace(settings.grid, **changes)
        found, _ = side_by_side(case, settings, memories, impatient)
        errors[str(size)] = found["errors"]
        rows += [_over_ours(row, found["rows"]) | {"size": size} for row in found["rows"]]
        for row in found["rows"]:
            if row.get("seconds", 0) > settings.patience:
                impatient[row["name"], row["backward"]] = f"more than {settings.patience:g} s at a smaller size"
    return _head(settings.grid, memories) | {"errors": errors, "rows": rows, "growth": growth(name, rows)}


def _head(case: Case, memories: Mapping[str, Make]) -> Results:
    missing = [name for name in MEMORIES if name not in memories]
    return {"case": dataclasses.asdict(case), "package": package.release(), "not_installed": missing}


def side_by_side(
    case: Case,
    settings: Settings,
    memories: Mapping[str, Make],
    left_out: Mapping[tuple[str, bool], str],
    others: Mapping[str, timing.Run] | None = None,
) -> tuple[Results, dict[str, list[float]]]:
    """Everyone at one size: peaks, then what they compute, then times, all in turn.

    Args:
        case: the size.
        settings: how often, and how much memory one may take.
        memories: who.
        left_out: passes that are not measured, and why.
        others: what is timed in turn with them.

    Returns:
        Rows (``left_out`` in those without figures) with the errors of each; and the seconds of all repeats.
    """
    inputs, redrawn = safe_inputs(case)
    rows: dict[tuple[str, bool], Results] = {}
    for name in memories:
        for kind in PASSES:
            row = rows[name, kind] = {"name": name, "backward": kind}
            try:
                if (name, kind) in left_out:
                    row["left_out"] = left_out[name, kind]
                else:
                    row["peak_bytes"] = peak.peak_bytes(name, case, kind, settings.memory)
            except peak.DoesNotFitError:
                row["left_out"] = f"more than {settings.memory / 1e9:g} GB"
    measured = {who: row for who, row in rows.items() if "left_out" not in row}
    present = {name: memories[name] for name, _ in measured}
    errors = check.check_memories(case, inputs, present, {name for name in present if (name, True) not in measured})
    made = {name: subjects.memory_run(make(inputs, case), inputs, case) for name, make in present.items()}
    runs = {f"{name} {PASSES[kind]}": partial(made[name], kind) for name, kind in measured}
    seconds = timing.in_turn({**(others or {}), **runs}, settings.repeats)
    for (name, kind), row in measured.items():
        row |= timing.summary(seconds[f"{name} {PASSES[kind]}"])
        row |= work.rates(case, kind, row["seconds"])
        row["state_bytes"] = states.state_bytes(name, inputs, case)
    said = (f"{name} {PASSES[kind]} {1e3 * row['seconds']:.3g} ms" for (name, kind), row in measured.items())
    console.print(f"T={case.tokens} n={case.n_subkeys} B={case.batch}: {', '.join(said)}", style="dim")
    return {"redrawn": redrawn, "errors": errors, "rows": list(rows.values())}, seconds


def _over_ours(row: Results, rows: Sequence[Results], ours: str = "fwpkm") -> Results:
    """The row with its time as a multiple of ours."""
    if "seconds" not in row:
        return row
    mine = {other["backward"]: other["seconds"] for other in rows if other["name"] == ours}
    return row | {"over_ours": row["seconds"] / mine[row["backward"]]}


def growth(name: str, rows: Sequence[Results]) -> list[Results]:
    """Exponents of seconds, peaks and states over the sizes that a memory was measured at."""
    power = 2 if name == "n_subkeys" else 1
    found = []
    for who, kind in dict.fromkeys((row["name"], row["backward"]) for row in rows):
        some = [row for row in rows if (row["name"], row["backward"]) == (who, kind) and "seconds" in row]
        if len(some) < 2:
            continue
        sizes = [row["size"] ** power for row in some]
        exponents = {}
        for key in ("seconds", "peak_bytes", "state_bytes"):
            costs = [row[key] for row in some if row.get(key)]
            exponents[key] = timing.growth(sizes, costs) if len(costs) == len(sizes) else None
        last = some[-1]["seconds"] / some[0]["seconds"]
        found.append({"name": who, "backward": kind, "sizes": len(sizes), "largest_over_smallest": last} | exponents)
    return found


def read(settings: Settings, case: Case) -> Results:
    """Our read and PyTorch's at one size."""
    rows_ = reads.draw(case)
    errors = check.check_reads(rows_)
    made = {name: reads.run(function, rows_) for name, function in reads.READS.items()}
    runs = {f"{name} {what}": partial(run, kind) for name, run in made.items() for kind, what in PASSES.items()}
    seconds = timing.in_turn(runs, settings.repeats)
    rows: list[Results] = [
        {"name": name, "backward": kind}
        | timing.summary(seconds[f"{name} {what}"])
        | {"peak_bytes": peak.peak_bytes(name, case, kind, settings.memory)}
        for name in made
        for kind, what in PASSES.items()
    ]
    rows = [_over_ours(row, rows, "memory_read") for row in rows]
    said = (f"{row['name']} {PASSES[row['backward']]} {1e3 * row['seconds']:.3g} ms" for row in rows)
    console.print(f"read of T={case.tokens} from n={case.n_subkeys}: {', '.join(said)}", style="dim")
    return {"case": dataclasses.asdict(case), "errors": errors, "rows": rows}


if __name__ == "__main__":
    typer.run(main)
