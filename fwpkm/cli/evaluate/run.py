"""What evaluations share: the model, the JSON file from which a run can be repeated, the picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.table import Table

import fwpkm
from fwpkm.checks import require
from fwpkm.cli.console import command_line, console, errors_in_one_line, progress_bars
from fwpkm.cli.subject import Subject
from fwpkm.files import write_atomically
from fwpkm.machine import machine
from fwpkm.progress import Progress
from fwpkm.report.plots import write_picture
from fwpkm.report.theme import Theme
from fwpkm.session_file import fingerprint

Out = Annotated[
    Path | None, typer.Option(help="JSON file for the figures, next to the model unless given; a picture beside it.")
]
Seed = Annotated[int, typer.Option(help="Draws what is random.")]
Column = Annotated[str, typer.Option(help="Where data sets have their text.")]

Settings = Mapping[str, Any]
Figures = dict[str, Any]
TIMES = ("seconds", "bytes_per_second", "peak_memory_mb")  # what differs from run to run


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as a command.

    Args:
        name: of the command.
        measure: called with the subject, a place to report progress, and the settings; the figures, as JSON takes them.
        table: the figures for a terminal.
        draw: a picture of the whole JSON file.
    """

    name: str
    measure: Callable[[Subject, Progress, Settings], Figures]
    table: Callable[[Figures], Table]
    draw: Callable[[Mapping[str, Any], Theme], Figure]

    def run(self, checkpoint: Path, out: Path | None, **settings: Any) -> None:
        """Measure, print and write."""
        with errors_in_one_line(), progress_bars() as progress:
            path = _json_file(out or checkpoint / f"{self.name}.json")
            results = self.results(Subject.load(checkpoint), settings, progress)
            self.write(results, path)
        console.print(self.table(results["figures"]))
        console.print(f"Figures: {path}\nPicture: {path.with_suffix('.png')}")

    def results(self, subject: Subject, settings: Settings, progress: Progress) -> dict[str, Any]:
        """What the JSON file has: what was measured, how, and of what."""
        head = {
            "evaluation": self.name,
            "version": fwpkm.__version__,
            "command": command_line(),
            "date": date.today().isoformat(),
            "machine": machine(),
            "checkpoint": str(subject.folder),
            "fingerprint": fingerprint(subject.model),
            "settings": dict(settings),
        }
        return head | {"figures": self.measure(subject, progress, settings)}

    def write(self, results: Mapping[str, Any], path: Path) -> None:
        """The JSON file and, beside it, the picture."""
        write_atomically(path, json.dumps(results, indent=1))
        write_picture(self.draw, results, path.with_suffix(".png"))


def run_again(evaluations: Mapping[str, Evaluation], file: Path, checkpoint: Path | None, out: Path | None) -> None:
    """Repeat the run that has written ``file``, and say which figures are not the same."""
    with errors_in_one_line(), progress_bars() as progress:
        before, out = _read(file), out and _json_file(out)
        name = before["evaluation"]
        require(name in evaluations, f"evaluation of {file}", repr(name), "one of {}", ", ".join(evaluations))
        evaluation = evaluations[name]
        subject = Subject.load(checkpoint or Path(before["checkpoint"]))
        found, expected = fingerprint(subject.model), before["fingerprint"]
        require(found == expected, f"the fingerprint of {subject.folder}", found, "{}, as in {}", expected, file)
        now = evaluation.results(subject, before["settings"], progress)
        if out is not None:
            evaluation.write(now, out)
    console.print(evaluation.table(now["figures"]))
    different = list(differences(before["figures"], now["figures"]))
    for line in different:
        console.print(line, markup=False)
    console.print(f"{len(different):,} figures differ." if different else "All figures are the same.")
    if different:
        raise typer.Exit(1)


def differences(before: Any, now: Any, name: str = "figures") -> Iterator[str]:
    """What differs between the figures of two runs, times left out, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted((before.keys() | now.keys()) - set(TIMES)):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{name}[{i}]")
    elif before != now:
        yield f"{name}: {before} before, {now} now"


def check_numbers(settings: Settings, *positive: str) -> None:
    """Check that settings are positive integers, or lists of them, and a seed not negative."""
    seed = settings.get("seed", 0)
    require(seed >= 0, "seed", seed, "a number >= 0")
    for name in positive:
        values = settings[name] if isinstance(settings[name], list) else [settings[name]]
        for value in values:
            require(value >= 1, name, value, "a positive integer")


def _json_file(path: Path) -> Path:
    require(path.suffix == ".json", "out", path, "a file *.json, beside which a picture *.png has its place")
    return path


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    wanted = {"evaluation", "checkpoint", "fingerprint", "settings", "figures"}
    ours = isinstance(found, dict) and wanted <= found.keys()
    require(ours, str(file), "without some of these", "what an evaluation has written, with {}", sorted(wanted))
    results: dict[str, Any] = found
    return results
