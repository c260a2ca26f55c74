"""Train a byte-level model on real text with needles in it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fwpkm.checks import require
from fwpkm.data import needles
from fwpkm.data.text import Bytes
from fwpkm.models import FwPKMForCausalLM


@dataclass(frozen=True)
class NeedleTraining:
    """How to train.

    Args:
        steps: optimizer steps; the learning rate warms up over the first twentieth and decays along a half cosine.
        batch: documents a step.
        length: bytes a document.
        needles: facts a document, at most; each document draws two thirds of it to all.
        learning_rate: peak of AdamW's.
        answer_weight: weight of the mean cross entropy of the answers' digits, beside that of all bytes.
        seed: draws the documents.
    """

    steps: int = 300
    batch: int = 16
    length: int = 1024
    needles: int = 10
    learning_rate: float = 3e-3
    answer_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "needles"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")


def train(model: FwPKMForCausalLM, text: Bytes, settings: NeedleTraining) -> Iterator[dict[str, Any]]:
    """Train ``model`` in place, and yield what each step measured (before it): loss, digit accuracy, gate, seconds."""
    rng = np.random.default_rng(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    model.train()
    start = time.perf_counter()
    for step in range(settings.steps):
        made, answers = needles.batch(text, rng, settings.batch, settings.length, settings.needles)
        tokens, asked = torch.from_numpy(made).long(), torch.from_numpy(answers)[:, 1:]
        result = model(tokens, labels=tokens)
        logits, digits = result.logits[:, :-1][asked], tokens[:, 1:][asked]
        answer_loss = cross_entropy(logits, digits)
        (result.loss + settings.answer_weight * answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.discard()  # a memory that a batch shared ends with it: numbers of other texts are of no use to the next
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            text_loss = cross_entropy(result.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        yield {
            "step": step + 1,
            "seconds": time.perf_counter() - start,
            "loss": text_loss.item(),
            "answer_loss": answer_loss.item(),
            "digit_accuracy": (logits.argmax(-1) == digits).float().mean().item(),
            "gate": None if result.mean_gate is None else result.mean_gate.item(),
        }


def _rate(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / max(1.0, steps / 20))
    return warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
