"""The recall table, for the page and for the documentation."""

from __future__ import annotations

from fwpkm.report.labels import bounded, count, decimal, length_label, percent
from fwpkm.report.results import Results, recall_by_length, recall_lengths

# What follows the length: a group of columns, and the column itself.
COLUMNS = (
    ("Asked", "Facts a text"),
    ("Asked", "Questions"),
    ("With memory", "Exact match (bound)"),
    ("With memory", "Digits"),
    ("Without memory", "Exact match (bound)"),
    ("Without memory", "Digits"),
    ("Cost", "Bytes/s"),
    ("Cost", "Peak MB"),
    ("Load", "Writes a slot"),
    ("Load", "Gated writes a slot"),
    ("Load", "Slots touched"),
)


def recall_rows(results: Results) -> list[list[str]]:
    """One row a length: the length, then :data:`COLUMNS`."""
    memory, control = (recall_by_length(results, model) for model in ("memory", "control"))
    rows = []
    for length in recall_lengths(results):
        ours, other = memory.get(length), control.get(length)
        asked = ours or {}
        load = asked.get("load") or {}
        rows.append(
            [
                length_label(length),
                count(asked.get("needles")),
                count(asked.get("questions")),
                bounded(ours),
                percent(asked.get("digits")),
                bounded(other),
                percent(other["digits"] if other else None),
                count(asked.get("bytes_per_second")),
                count(asked.get("peak_memory_mb")),
                decimal(load.get("writes_per_slot")),
                decimal(load.get("open_gate_writes_per_slot")),
                percent(load.get("slots_touched")),
            ]
        )
    return rows


def markdown_table(results: Results) -> str:
    """The recall table as Markdown: one line a length of text, ending with a newline."""
    columns = ["Length"] + [
        f"{group}: {name.lower()}" if group == "Without memory" else name for group, name in COLUMNS
    ]
    lines = [columns, ["---:"] * len(columns), *recall_rows(results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
