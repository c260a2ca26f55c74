"""What the documentation's tables are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.running import Results
from fwpkm.report.labels import MISSING

Make = Callable[[Results], str]  # Markdown of the content of a file of results, or nothing where it has none


def of(section: str, make: Make) -> Make:
    """The table of a section, if it has been measured."""
    return lambda results: make(results[section]) if section in results else ""


def table(head: Sequence[str], lines: Sequence[Sequence[str]], alignment: str) -> str:
    """A Markdown table; ``alignment`` has an ``l`` or an ``r`` for each column."""
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def time_of(row: Results) -> str:
    """The median with its quartiles."""
    if "seconds" not in row:
        return MISSING
    low, high = row["quartiles"]
    if row["seconds"] >= 1:
        return f"{row['seconds']:.2f} s ({low:.2f}–{high:.2f})"
    return f"{three(1e3 * row['seconds'])} ms ({three(1e3 * low)}–{three(1e3 * high)})"


def median_of(row: Results) -> str:
    """The median alone."""
    return MISSING if "seconds" not in row else time_of(row).split(" (")[0]


def three(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def milliseconds(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{three(1e3 * seconds)} ms"


def size_of(number: float | None) -> str:
    """Bytes, in megabytes or gigabytes."""
    if number is None:
        return MISSING
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{three(number / 1e6)} MB"


def over(row: Results) -> str:
    """How many times what ours takes."""
    return f"{row['over_ours']:.3g}×" if "over_ours" in row else MISSING


def exponent(number: float | None) -> str:
    return MISSING if number is None else f"{number:.2f}"


def measured_on(results: dict[str, Any]) -> str:
    """What a section, or a whole file, was measured on, when and by which command."""
    where = results.get("where", results)
    machine = where["machine"]
    load = f", load {where['load_before']:.1f} before the run" if "load_before" in where else ""
    return (
        f"{machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}, "
        f"torch {machine['torch']}, {where['date']}{load}: `{where['command']}`"
    )
