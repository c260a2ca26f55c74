"""The tables of ``results/retention.json``."""

from __future__ import annotations

from benchmarks.markdown import measured_on, table
from benchmarks.running import Results
from fwpkm.report.labels import MISSING, percent

LEAST_GAIN = 0.005  # nats a byte


def recall(results: Results) -> str:
    """Facts of A and of B that come back."""
    lines = []
    for row in results["rows"]:
        shares = [share for found in row["recall"].values() for share in found.values() if share]
        lines.append([row["name"], row["addition"], *(percent(share["exact"]) for share in shares)])
    kept = ["A at once", "A after help without facts", "A after code", "B: code", "A after help", "B: help"]
    return table(["Model", "Addition", *kept], lines, "ll" + "r" * len(kept)) + f"\n{measured_on(results)}.\n"


def adaptation(results: Results) -> str:
    """The losses of A's text, and what is kept of a gain that can be told from none."""
    lines = []
    for row in results["rows"]:
        if "adaptation" in row:
            first, again, after_b, kept = (row["adaptation"][x] for x in ("first", "again", "after", "kept"))
            share = f"{kept:.0%}" if first - again >= LEAST_GAIN else MISSING
            lines.append([row["name"], *(f"{loss:.3f}" for loss in (first, again, after_b)), share])
    return table(["Model", "New", "Again at once", "Again after B", "Kept"], lines, "lrrrr")
