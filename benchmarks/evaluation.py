"""What ``fwpkm eval`` measures of the demo's model and of one trained on plain text: ``results/evaluation.json``.

``fwpkm demo`` and ``fwpkm train out/run --steps 400`` make the models. ``python -m benchmarks.evaluation`` runs those
evaluations that the file does not have yet, or those that are named, and puts the tables into docs/evaluation.md.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import typer

from benchmarks import tables
from benchmarks.tables import Results, Tables, table
from fwpkm.cli import app
from fwpkm.files import write_atomically
from fwpkm.report.labels import MISSING, bounded, length_label, percent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
PAGE = ROOT / "docs" / "evaluation.md"
DEMO, PLAIN = "out/demo/checkpoint", "out/run"
MODES = ["--memory", "on", "--memory", "off", "--memory", "reset", "--reset-every", "2048"]
RUNS = {
    "perplexity": ["perplexity", PLAIN, *MODES],
    "adaptation": ["adaptation", PLAIN],
    "gates": ["gates", PLAIN],
    "gates of the demo": ["gates", DEMO],
    "recall": ["recall", DEMO],
    "recall of plain text": ["recall", PLAIN],
    "pairs": ["needles", DEMO, "--form", "pairs", "--length", "4096", "--length", "8192", "--texts", "8"],
    "needles": ["needles", DEMO, "--texts", "8", "--readings", "4"],
}
PICTURES = {"perplexity": "perplexity", "adaptation": "adaptation", "gates of the demo": "gates", "needles": "needles"}


def run(name: str) -> Results:
    """One evaluation; its picture goes to docs/images."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        typer.main.get_command(app).main(["eval", *RUNS[name], "--out", str(out)], standalone_mode=False)
        if name in PICTURES:
            shutil.copy(out.with_suffix(".png"), ROOT / "docs" / "images" / f"{PICTURES[name]}.png")
        results: Results = json.loads(out.read_text())
    return results | {"command": shlex.join(["fwpkm", "eval", *RUNS[name]])}


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
    machine = results["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"\n`{results['command']}`: {machine['cpu']}, {threads}, torch {machine['torch']}, {results['date']}.\n"


_MAKE = {"perplexity": perplexity, "adaptation": adaptation, "gates": gates, "recall": recall, "needles": needles}
TABLES: Tables = {name: (name, _MAKE[command]) for name, (command, *_) in RUNS.items()}


def filled(text: str, results: Results) -> str:
    """The page with every table that has marks in it."""
    return tables.filled(text, results, "evaluation.json", TABLES)


def main(names: list[str]) -> None:
    """Run evaluations, and keep each as it ends."""
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [name for name in RUNS if name not in results]:
        results[name] = run(name)
        write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    write_atomically(PAGE, filled(PAGE.read_text(), results))


if __name__ == "__main__":
    main(sys.argv[1:])
