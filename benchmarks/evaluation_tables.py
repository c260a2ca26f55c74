"""The tables of ``results/evaluation.json``."""

from __future__ import annotations

from benchmarks.markdown import Make, measured_on, of, table
from benchmarks.running import Results
from fwpkm.report.labels import MISSING, bounded, length_label, percent


def perplexity(results: Results) -> str:
    """In all, and by position."""
    runs = results["figures"]["runs"]
    lines = [["all", *(f"{x['perplexity']:.3f}" for x in runs)]]
    for bins in zip(*(x["positions"] for x in runs), strict=True):
        span = f"{length_label(bins[0]['from'])} to {length_label(bins[0]['to'])}"
        lines.append([span, *(f"{x['perplexity']:.3f}" for x in bins)])
    head = ["Tokens read before", *(f"Memory {x['memory']}" for x in runs)]
    return table(head, lines, "r" * len(head)) + _how(results)


def adaptation(results: Results) -> str:
    """What a text costs at first, at once again, and after another."""
    lines = []
    for x in results["figures"]["runs"]:
        losses = (f"{x[name]:.4f}" for name in ("first", "again", "after"))
        kept = MISSING if x["kept"] is None else f"{x['kept']:.1%}"
        lines.append([x["memory"], *losses, f"{x['first'] - x['again']:z.4f}", kept])
    head = ["Memory", "A at first", "A again at once", "A again after B", "Gain", "Kept after B"]
    return table(head, lines, "lrrrrr") + _how(results)


def gates(results: Results) -> str:
    """The mean gate on each text, and how often it is open."""
    lines = []
    for text in results["figures"]["texts"]:
        for layer in text["layers"]:
            half = len(layer["histogram"]) // 2
            lines.append([text["name"], f"{layer['mean']:.4f}", percent(sum(layer["histogram"][half:]))])
    return table(["Text", "Mean gate", "Gates above ½"], lines, "lrr") + _how(results)


def recall(results: Results) -> str:
    """Values given right, by number of pairs."""
    lines = []
    for row in results["figures"]["recall"]:
        right = f"{percent(row['right'])} (≥ {percent(row['right_lower95'])})"
        lines.append(
            [f"{row['pairs']:,}", f"{row['length']:,}", f"{row['questions']:,}", right, percent(row["chance"])]
        )
    return table(["Pairs", "Tokens", "Questions", "Right (bound)", "Guessing"], lines, "rrrrr") + _how(results)


def needles(results: Results) -> str:
    """Exact match by length, a column for each number of readings."""
    rows = {(row["length"], row["readings"]): row for row in results["figures"]["recall"]}
    readings = sorted({number for _, number in rows})
    lines = [
        [length_label(length), f"{rows[length, 1]['questions']:,}", *(bounded(rows[length, x]) for x in readings)]
        for length in sorted({length for length, _ in rows})
    ]
    named = ["1 reading", *(f"{x} readings" for x in readings[1:])]
    return table(["Length", "Questions", *named], lines, "r" * (2 + len(named))) + _how(results)


def _how(results: Results) -> str:
    return f"\n{measured_on(results)}.\n"


TABLES: dict[str, Make] = {
    name: of(name, make)
    for name, make in {
        "perplexity": perplexity,
        "adaptation": adaptation,
        "gates": gates,
        "gates of the demo": gates,
        "recall": recall,
        "recall of plain text": recall,
        "pairs": needles,
        "needles": needles,
    }.items()
}
