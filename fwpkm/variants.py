"""The demo's model with every key update, write scale and query convolution, trained alike and compared."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fwpkm
from fwpkm.checks import require
from fwpkm.data.text import load_split, standard_library, text_files
from fwpkm.demo import (
    DemoSettings,
    Questions,
    documents,
    for_sequences,
    machine,
    new_model,
    train_with_progress,
)
from fwpkm.evaluation.recall import ask
from fwpkm.files import write_atomically
from fwpkm.memory import KEY_UPDATES, WRITE_SCALES
from fwpkm.training.loop import Progress
from fwpkm.training.needles import NeedleTraining

QUERY_CONVS = (0, 4, 8, 16)
TRAINING = NeedleTraining(steps=200, batch=8)  # shorter than the demo's: there are twelve of them
QUESTIONS = (Questions(1 << 10, 64, 7), Questions(1 << 14, 8, 32), Questions(1 << 17, 4, 64))

Row = dict[str, Any]


def variants(settings: DemoSettings) -> list[DemoSettings]:
    """Three key updates times three write scales, then the other widths of the query convolution.

    The widths are compared with keys that do not learn: what differs is what the convolution does.
    """
    grid = [
        dataclasses.replace(settings, key_update=key_update, write_scale=write_scale)
        for key_update in KEY_UPDATES
        for write_scale in WRITE_SCALES
    ]
    settings = dataclasses.replace(settings, key_update="train_only")
    widths = [dataclasses.replace(settings, query_conv=width) for width in QUERY_CONVS]
    return grid + [variant for variant in widths if variant not in grid]


def run(
    out: Path, settings: DemoSettings, text: Path | None, command: str, workers: int, progress: Progress
) -> list[Row]:
    """Train and ask every variant, ``workers`` at a time with a thread each; rows go to ``out/variants.json``.

    Each row is kept in a file of its own as it comes, so that an interrupted comparison goes on from there.

    Raises:
        ValueError: if ``out`` holds rows of another training.
    """
    wanted = variants(settings)
    missing = [variant for variant in wanted if not _row_path(out, variant).exists()]
    progress("variants", len(wanted) - len(missing), len(wanted))
    # spawn: a forked child of a process that has run threads can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_run_one, out, variant, text) for variant in missing]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            progress("variants", len(wanted) - len(missing) + done, len(wanted))
    rows = [json.loads(_row_path(out, variant).read_text()) for variant in wanted]
    training = dataclasses.asdict(settings.training)
    same = all(row["training"] == training for row in rows)
    require(same, "out", out, "a new folder: this one holds rows of another training")
    head = {"version": fwpkm.__version__, "command": command, "date": date.today().isoformat(), "machine": machine()}
    write_atomically(out / "variants.json", json.dumps(head | {"rows": rows}, indent=1))
    return rows


def _row_path(out: Path, variant: DemoSettings) -> Path:
    return out / "rows" / f"{variant.key_update}-{variant.write_scale}-conv{variant.query_conv}.json"


def _run_one(out: Path, variant: DemoSettings, text: Path | None) -> None:
    torch.set_num_threads(1)
    train_text, held_out = load_split(text_files(text) if text else standard_library())
    model = new_model(variant, memory=True)
    history = train_with_progress(model, train_text, variant.training, "training", lambda what, done, total: None)
    served = for_sequences(model, variant.chunk)
    recalls = {str(a.length): ask(served, documents(held_out, a, variant.seed)).summary() for a in QUESTIONS}
    row = {
        "key_update": variant.key_update,
        "write_scale": variant.write_scale,
        "query_conv": variant.query_conv,
        "recall": {length: recall["exact"] for length, recall in recalls.items()},
        "digits": {length: recall["digits"] for length, recall in recalls.items()},
        "questions": {length: recall["questions"] for length, recall in recalls.items()},
        "training": dataclasses.asdict(variant.training),
        "training_digit_accuracy": history[-1]["digit_accuracy"],
        "training_seconds": history[-1]["seconds"],
    }
    write_atomically(_row_path(out, variant), json.dumps(row, indent=1))


def markdown(rows: list[Row]) -> str:
    """The comparison as a Markdown table: exact match (digit accuracy) at each length."""
    lengths = list(rows[0]["recall"])
    head = ["key_update", "write_scale", "query_conv", *(f"{int(length) // 1024}K" for length in lengths)]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        cells = [f"{row['recall'][x]:.1%} ({row['digits'][x]:.1%})" for x in lengths]
        lines.append(" | ".join([row["key_update"], row["write_scale"], str(row["query_conv"]), *cells]))
    return "\n".join(f"| {line} |" for line in lines)
