"""Train every model on the same documents for the same number of steps, and measure them alike."""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fwpkm
from fwpkm.baselines.models import Baseline, baselines, state_bytes
from fwpkm.checks import require
from fwpkm.data.text import Bytes, load_split, standard_library, text_files
from fwpkm.demo import DemoSettings, Questions, described, documents, train_with_progress
from fwpkm.evaluation.perplexity import perplexity
from fwpkm.evaluation.recall import SIDE_BY_SIDE, ask
from fwpkm.files import write_atomically
from fwpkm.layers.host import CACHE
from fwpkm.machine import machine
from fwpkm.models import FwPKMForCausalLM, FwPKMOutput
from fwpkm.progress import Progress
from fwpkm.report.baselines import draw_baselines
from fwpkm.report.plots import write_picture
from fwpkm.training.needles import NeedleTraining

SETTINGS = DemoSettings(  # trained for fewer steps than the demo, and asked less: there are fifteen models
    training=NeedleTraining(steps=200, batch=8),
    questions=(Questions(1 << 10, 64, 7), Questions(1 << 14, 8, 32), Questions(1 << 17, 1, 128)),
    perplexity_bytes=1 << 17,
)
LONGER = 4  # times the training length: what text is predicted at


def run(
    out: Path,
    settings: DemoSettings,
    text: Path | None,
    command: str,
    workers: int,
    progress: Progress,
    wanted: Sequence[Baseline] | None = None,
) -> dict[str, Any]:
    """Train and measure every model, ``workers`` at a time with a thread each; ``out`` gets table, plot and models.

    Each row is kept in a file of its own as it comes, so that an interrupted comparison goes on from there.

    Args:
        out: a folder for ``baselines.json``, ``baselines.png``, ``rows/`` and ``models/`` (those with an FwPKM).
        settings: training, questions and sizes; its key update, write scale and query convolution do not count
            where a model has its own.
        text: a file or folder, or None for Python's standard library.
        command: how this was called.
        workers: processes.
        progress: is told of every finished model.
        wanted: the models; by default :func:`fwpkm.baselines.models.baselines`.

    Returns:
        What ``baselines.json`` holds: ``version``, ``command``, ``date``, ``machine``, ``settings`` and ``rows``.

    Raises:
        ValueError: if ``out`` holds rows of other settings.
    """
    wanted = baselines(settings) if wanted is None else wanted
    paths = [out / "rows" / f"{file_name(baseline)}.json" for baseline in wanted]
    known = described(settings, text)
    for path in paths:
        same = not path.exists() or json.loads(path.read_text())["settings"] == known
        require(same, "out", out, "a new folder: this one holds rows of other settings")
    missing = [(baseline, path) for baseline, path in zip(wanted, paths, strict=True) if not path.exists()]
    _split(text)  # refused here, not in every process
    finished = len(wanted) - len(missing)
    progress("models", finished, len(wanted))
    # spawn: a forked child of a process that has run threads can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_run_one, out, path, baseline, settings, text) for baseline, path in missing]
        for done, future in enumerate(as_completed(futures), start=finished + 1):
            future.result()
            progress("models", done, len(wanted))
    results: dict[str, Any] = {
        "version": fwpkm.__version__,
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": 1},
        "settings": known,
        "rows": [json.loads(path.read_text())["row"] for path in paths],
    }
    write_atomically(out / "baselines.json", json.dumps(results, indent=1))
    write_picture(draw_baselines, results, out / "baselines.png")
    return results


def file_name(baseline: Baseline) -> str:
    """Of its row and its folder in ``models/``, without an ending."""
    return re.sub(r"\W+", "-", baseline.name.lower())


def _split(text: Path | None) -> tuple[Bytes, Bytes]:
    return load_split(text_files(text) if text else standard_library())


def _run_one(out: Path, path: Path, baseline: Baseline, settings: DemoSettings, text: Path | None) -> None:
    torch.set_num_threads(1)
    train_text, held_out = _split(text)
    model = baseline.build(settings)
    times = [time.process_time()]
    history = train_with_progress(
        model, train_text, settings.training, "training", lambda what, done, total: times.append(time.process_time())
    )
    served = baseline.for_sequences(model, settings)
    row = {
        "name": baseline.name,
        "changes": baseline.changes,
        "parameters": model.num_parameters(),
        "training": training_figures(history, times, settings.training),
        **measure(served, held_out, settings),
    }
    if served.memories():
        served.save_pretrained(out / "models" / file_name(baseline))
    write_atomically(path, json.dumps({"settings": described(settings, text), "row": row}, indent=1))


def training_figures(
    history: Sequence[dict[str, Any]], times: Sequence[float], training: NeedleTraining
) -> dict[str, Any]:
    """Speed by the median step, and digit accuracy at the end.

    ``times`` are the CPU seconds of this one thread before the first step and after each: however busy the machine is
    with other things, they hardly change.
    """
    step = statistics.median(after - before for before, after in pairwise(times))
    return {
        "tokens_per_cpu_second": training.batch * training.length / step,
        "cpu_seconds": times[-1] - times[0],
        "digit_accuracy": history[-1]["digit_accuracy"],
    }


def measure(model: FwPKMForCausalLM, text: Bytes, settings: DemoSettings) -> dict[str, Any]:
    """Perplexity of plain text in pieces :data:`LONGER` times as long as in training, recall, and bytes of state."""
    length = LONGER * settings.training.length
    piece = text[: settings.perplexity_bytes]
    predicted = perplexity(model, piece, rows=max(1, piece.size // length), call=512)
    # Full attention reads whole documents: a later call would need a mask over all that was read.
    call = SIDE_BY_SIDE if "full_attention" in (model.config.layer_types or ()) else 1 << 15
    recall, state = {}, 0

    def weigh(module: Any, inputs: Any, result: FwPKMOutput) -> None:
        nonlocal state
        assert result.logits is not None
        state = state_bytes(result[CACHE]) // result.logits.shape[0]

    hook = model.register_forward_hook(weigh)
    for asked in sorted(settings.questions, key=lambda asked: asked.length):
        summary = ask(model, documents(text, asked, settings.seed), call).summary()
        recall[str(asked.length)] = {key: summary[key] for key in ("exact", "exact_lower95", "digits", "questions")}
    hook.remove()
    return {
        "text": {"length": length, "nats_per_byte": predicted["nats_per_byte"]},
        "recall": recall,
        "state": {"length": asked.length, "bytes": state},
    }
