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
from benchmarks.running import Results
from fwpkm.cli import app
from fwpkm.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
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


def main(names: list[str]) -> None:
    """Run evaluations, and keep each as it ends."""
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [name for name in RUNS if name not in results]:
        results[name] = run(name)
        write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    tables.update()


if __name__ == "__main__":
    main(sys.argv[1:])
