"""The demo: train a small model with a memory and one without, ask both for needles up to a megabyte back, show it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

import fwpkm
from fwpkm.checks import require
from fwpkm.data.needles import SENTENCE_BYTES, Document, document
from fwpkm.data.text import Bytes, load_split, standard_library, text_files
from fwpkm.evaluation.memory import never_written, reconfigured
from fwpkm.evaluation.perplexity import perplexity
from fwpkm.evaluation.recall import Recall, ask
from fwpkm.files import write_atomically
from fwpkm.machine import machine
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM
from fwpkm.progress import Progress, counter
from fwpkm.report.page import write_page
from fwpkm.report.plots import draw_heat_map, draw_recall_curve, draw_training_curve, write_picture
from fwpkm.training.needles import NeedleTraining, train

CONTEXT = 120  # bytes of text shown around a needle
HEAD = 32  # the smallest size of an attention head that vLLM serves


@dataclass(frozen=True)
class Questions:
    """How many documents of ``length`` bytes to ask about, with how many needles each."""

    length: int
    documents: int
    needles: int


@dataclass(frozen=True)
class DemoSettings:
    """What a demo trains and asks."""

    training: NeedleTraining = field(default_factory=NeedleTraining)
    questions: tuple[Questions, ...] = (
        Questions(1 << 10, 144, 7),
        Questions(1 << 12, 64, 16),
        Questions(1 << 14, 16, 64),
        Questions(1 << 16, 12, 84),
        Questions(1 << 17, 12, 84),
        Questions(1 << 20, 1, 320),
    )
    overwritten: Questions = Questions(1 << 14, 16, 32)
    perplexity_bytes: int = 1 << 18
    examples: int = 6
    width: int = 96
    n_subkeys: int = 256
    key_update: str = "slow"
    write_scale: str = "exact"
    query_conv: int = 16
    gate_weight: float = 1.0
    training_chunk: int = 64
    chunk: int = 256
    seed: int = 0

    def model_config(self, memory: bool) -> FwPKMConfig:
        """Two blocks, a 64-byte window each; the first with a memory that all documents of a training step share.

        Sharing makes a thousand-byte document feel the crowd of a much longer one: whatever the others write is in
        the way.
        """
        width = self.width
        return FwPKMConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=2,
            num_attention_heads=max(1, width // HEAD),
            head_dim=HEAD,
            layer_types=["sliding_attention"] * 2,
            sliding_window=64,
            fwpkm_layers=[0] if memory else [],
            fwpkm_n_subkeys=self.n_subkeys,
            fwpkm_key_dim=width,
            fwpkm_value_dim=width,
            fwpkm_query_conv=self.query_conv,
            fwpkm_chunk_size=self.training_chunk,
            fwpkm_key_update=self.key_update,
            fwpkm_write_scale=self.write_scale,
            fwpkm_scope="shared",
            fwpkm_gate_weight=self.gate_weight,
        )


def run(out: Path, settings: DemoSettings, text: Path | None, command: str, progress: Progress) -> dict[str, Any]:
    """Run the demo, or go on with an interrupted one, and write everything into the folder ``out``.

    Each finished stage is kept in ``out/results.json``, so that an interrupted demo goes on after its last one.

    Returns:
        The results, in the form that :mod:`fwpkm.report.results` describes.

    Raises:
        ValueError: if ``out`` holds the results of other settings.
    """
    stages = _Stages(out / "results.json", described(settings, text))
    results = stages.results
    results |= {
        "version": fwpkm.__version__,
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine(),
    }
    train_text, held_out = load_split(text_files(text) if text else standard_library())
    models: dict[str, FwPKMForCausalLM] = {}
    for name in ("memory", "control"):
        checkpoint = out / ("checkpoint" if name == "memory" else "control")

        trained = stages.run(f"training {name}", partial(_train, name, checkpoint, train_text, settings, progress))
        results.setdefault("training", {})[name] = trained["history"]
        results.setdefault("parameters", {})[name] = trained["parameters"]
        models[name] = FwPKMForCausalLM.from_pretrained(checkpoint)

    results["recall"], results["examples"] = [], []
    for asked in settings.questions:
        stage = stages.run(f"recall {asked.length}", partial(_recall, models, held_out, asked, settings, progress))
        results["recall"] += stage["rows"]
        results["examples"] += stage["examples"]
    results["overwritten"] = stages.run("overwritten", partial(_overwritten, models, held_out, settings, progress))
    results["perplexity"] = stages.run("perplexity", partial(_perplexities, models, held_out, settings, progress))
    # A few of the longest: those that are the hardest to believe.
    results["examples"] = sorted(results["examples"], key=lambda e: -e["length"])[: settings.examples]
    stages.save()
    pictures = {"recall": draw_heat_map, "recall-curve": draw_recall_curve, "training": draw_training_curve}
    for name, draw in pictures.items():
        write_picture(draw, results, out / f"{name}.png")
    write_page(results, out / "index.html")
    return results


def _train(name: str, checkpoint: Path, text: Bytes, settings: DemoSettings, progress: Progress) -> dict[str, Any]:
    model = new_model(settings, memory=name == "memory")
    history = train_with_progress(model, text, settings.training, f"training {name}", progress)
    for_sequences(model, settings.chunk).save_pretrained(checkpoint)
    return {"history": history, "parameters": model.num_parameters()}


class _Stages:
    """Results that are kept as they come; a finished stage is not run again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {"settings": settings, "stages": {}}
        if path.exists():
            kept = json.loads(path.read_text())
            same = kept.get("settings") == json.loads(json.dumps(settings))
            require(same, "out", path.parent, "a new folder: this one holds the results of other settings")
            self.results = kept

    def run(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.results["stages"]:
            self.results["stages"][name] = compute()
            self.save()
        return self.results["stages"][name]

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.results, indent=1))


def new_model(settings: DemoSettings, memory: bool) -> FwPKMForCausalLM:
    """The untrained model, the same for the same settings."""
    set_seed(settings.seed)
    return FwPKMForCausalLM(settings.model_config(memory))


def train_with_progress(
    model: FwPKMForCausalLM, text: Bytes, training: NeedleTraining, what: str, progress: Progress
) -> list[dict[str, Any]]:
    """Train, telling ``progress`` about every step."""
    history = []
    for record in train(model, text, training):
        history.append(record)
        progress(f"{what}: {record['digit_accuracy']:.0%} of digits", record["step"], training.steps)
    return history


def for_sequences(model: FwPKMForCausalLM, chunk: int) -> FwPKMForCausalLM:
    """The same weights in a model where every sequence has a memory of its own, with chunks of ``chunk`` bytes.

    The last byte of a chunk stores nothing, its target lies in the next one: longer chunks lose fewer digits.
    """
    return reconfigured(model, fwpkm_scope="sequence", fwpkm_chunk_size=chunk)


def documents(text: Bytes, asked: Questions, seed: int, overwritten: int = 0) -> list[Document]:
    """The documents to ask about; the same for the same arguments."""
    rng = np.random.default_rng((seed, asked.length, overwritten))
    return [document(text, rng, asked.length, asked.needles, overwritten) for _ in range(asked.documents)]


def _ask(
    models: dict[str, FwPKMForCausalLM], made: list[Document], what: str, progress: Progress
) -> Iterable[tuple[str, Recall]]:
    done = counter(progress, what, len(models) * sum(d.tokens.size for d in made))
    for name, model in models.items():
        yield name, ask(model, made, on_bytes=done)


def _recall(
    models: dict[str, FwPKMForCausalLM], text: Bytes, asked: Questions, settings: DemoSettings, progress: Progress
) -> dict[str, Any]:
    made = documents(text, asked, settings.seed)
    recalls = dict(_ask(models, made, f"asking at {asked.length:,} bytes", progress))
    rows = [{"model": name, **recall.summary()} for name, recall in recalls.items()]
    return {"rows": rows, "examples": examples(recalls["memory"], recalls["control"], settings.examples)}


def _overwritten(
    models: dict[str, FwPKMForCausalLM], text: Bytes, settings: DemoSettings, progress: Progress
) -> list[dict[str, Any]]:
    asked = settings.overwritten
    made = documents(text, asked, settings.seed, overwritten=asked.needles)
    rows = []
    for name, recall in _ask(models, made, "asking for overwritten numbers", progress):
        summary = recall.summary()
        kept = {key: summary[key] for key in ("length", "questions", "exact", "exact_lower95")}
        rows.append({"model": name, **kept, "stale": recall.stale_share()})
    return rows


def _perplexities(
    models: dict[str, FwPKMForCausalLM], text: Bytes, settings: DemoSettings, progress: Progress
) -> list[dict[str, Any]]:
    piece = text[: settings.perplexity_bytes]
    cases = (
        ("memory", "on", models["memory"]),
        ("memory", "off", never_written(models["memory"])),
        ("control", "none", models["control"]),
    )
    rows = []
    for i, (name, memory, model) in enumerate(cases):
        progress("perplexity", i, len(cases))
        rows.append({"model": name, "memory": memory, **perplexity(model, piece)})
    progress("perplexity", len(cases), len(cases))
    return rows


def examples(memory: Recall, control: Recall, count: int) -> list[dict[str, Any]]:
    """A few questions of the first document, at depths spread over it, with what both models answered."""
    made = memory.documents[0]
    length = made.tokens.size
    order = np.argsort(made.needles)
    chosen = order[np.linspace(0, order.size - 1, min(count, order.size)).astype(int)]
    shown = []
    for q in chosen:
        start, stop = int(made.needles[q]), int(made.needles[q]) + SENTENCE_BYTES
        first, last = max(0, start - CONTEXT), min(length, stop + CONTEXT)
        gates = memory.gates[0, first:last] if memory.gates is not None else np.zeros(last - first)
        shown.append(
            {
                "length": length,
                "depth": start / length,
                "distance": int(made.answers[q, 0]) - start,
                "question": f"The secret number for ID-{made.names[q]} is",
                "expected": _text(made.tokens[made.answers[q]]),
                "memory": _text(memory.answers[0, q]),
                "control": _text(control.answers[0, q]),
                "before": _text(made.tokens[first:start]),
                "needle": _text(made.tokens[start:stop]),
                "after": _text(made.tokens[stop:last]),
                "gates": [round(float(g), 3) for g in gates],
            }
        )
    return shown


def _text(tokens: Bytes) -> str:
    """Bytes as text, one character a byte, so that gates line up."""
    return bytes(tokens).decode("latin-1")


def described(settings: DemoSettings, text: Path | None) -> dict[str, Any]:
    """Settings and text as JSON takes them, by which an interrupted run knows its own results again."""
    flat = dataclasses.asdict(settings)
    training = flat.pop("training")
    flat["questions"] = [f"{q['documents']} x {q['needles']} in {q['length']} bytes" for q in flat["questions"]]
    flat["overwritten"] = "{documents} x {needles} in {length} bytes".format(**flat["overwritten"])
    flat["text"] = str(text) if text else "Python standard library"
    return {f"training_{name}": value for name, value in training.items()} | flat
