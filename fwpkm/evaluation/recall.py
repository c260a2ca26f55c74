"""Needle recall: stream documents through a model, and see which numbers it gives back."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fwpkm.data.needles import DIGITS, Document
from fwpkm.evaluation.stream import OnTokens, ignored, stream
from fwpkm.models import FwPKMForCausalLM

DEPTH_BINS = 8
SIDE_BY_SIDE = 1 << 18


@dataclass(frozen=True)
class Recall:
    """What a model answered to the questions of documents of one length.

    A digit counts as given when it is the model's most likely byte after the question and the *true* digits before it;
    all six are right exactly when greedy decoding gives the number.
    """

    documents: Sequence[Document]
    answers: NDArray[np.uint8]  # [documents, Q, 6] the bytes given
    gates: NDArray[np.float32] | None  # [documents, T] of the first memory layer
    slots_touched: float  # share of its slots, mean over the documents
    slots_a_token: int
    n_slots: int
    seconds: float

    @property
    def right(self) -> NDArray[np.bool_]:
        """``[documents, Q, 6]`` which digits are right."""
        return self.answers == np.stack([d.tokens[d.answers] for d in self.documents])

    def summary(self) -> dict[str, Any]:
        """Shares, by depth too, the load of the slots, speed and memory, as JSON takes them."""
        exact = self.right.all(-1).flatten()
        length = self.documents[0].tokens.size
        depths = np.concatenate([d.needles for d in self.documents]) / length
        return {
            "length": length,
            "needles": self.answers.shape[1],
            "questions": exact.size,
            "exact": float(exact.mean()),
            "exact_lower95": lower_bound(int(exact.sum()), exact.size),
            "digits": float(self.right.mean()),
            "depths": by_depth(exact, depths),
            "seconds": self.seconds,
            "bytes_per_second": length * len(self.documents) / self.seconds,
            "peak_memory_mb": peak_memory_mb(),
            "load": self._load(),
        }

    def stale_share(self) -> float:
        """Share of the questions answered with a number that had been overwritten."""
        given = [bytes(row).decode("latin-1") for document in self.answers for row in document]
        stale = [number for document in self.documents for number in document.stale]
        return float(np.mean([a == b for a, b in zip(given, stale, strict=True)]))

    def _load(self) -> dict[str, float] | None:
        if self.gates is None:
            return None
        a_token = self.slots_a_token / self.n_slots
        return {
            "writes_per_slot": self.gates.shape[1] * a_token,
            "open_gate_writes_per_slot": float(self.gates.sum(1).mean()) * a_token,
            "slots_touched": self.slots_touched,
        }


def ask(
    model: FwPKMForCausalLM,
    documents: Sequence[Document],
    call: int = 1 << 15,
    on_bytes: OnTokens = ignored,
) -> Recall:
    """Stream documents of one length through ``model``, ``call`` bytes a call, and collect its answers.

    As many documents are read side by side as have :data:`SIDE_BY_SIDE` bytes together. ``on_bytes`` is told after each
    call how many bytes were read.
    """
    group = max(1, SIDE_BY_SIDE // documents[0].tokens.size)
    start = time.perf_counter()
    streams = [_stream(model, documents[i : i + group], call, on_bytes) for i in range(0, len(documents), group)]
    answers, gates, touched = (torch.cat(parts) for parts in zip(*streams, strict=True))
    return Recall(
        documents=documents,
        answers=answers.numpy(),
        gates=gates.numpy() if gates.numel() else None,
        slots_touched=touched.mean().item(),
        slots_a_token=model.config.fwpkm_heads * model.config.fwpkm_topk,
        n_slots=model.config.fwpkm_n_subkeys**2,
        seconds=time.perf_counter() - start,
    )


def _stream(
    model: FwPKMForCausalLM, documents: Sequence[Document], call: int, on_bytes: OnTokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The answers ``[B, Q, 6]``, gates ``[B, T]`` (``[B, 0]`` without a memory) and share of slots touched ``[B]``."""
    tokens = torch.from_numpy(np.stack([d.tokens for d in documents]))
    batch = len(documents)
    before_answers = torch.from_numpy(np.stack([d.answers for d in documents]) - 1).flatten(1)
    given, gates = torch.zeros_like(tokens), [torch.empty(batch, 0)]
    touched = torch.zeros(batch, model.config.fwpkm_n_subkeys**2, dtype=torch.bool)
    for read, result in stream(model, tokens, max(1, call // batch), on_bytes):
        given[:, read] = result.logits.argmax(-1)
        if result.gates and result.slots:
            gates.append(result.gates[0].cpu())
            touched.scatter_(1, result.slots[0].flatten(1).cpu(), True)
    answers = given.gather(1, before_answers).view(batch, -1, DIGITS)
    return answers, torch.cat(gates, 1), touched.float().mean(1)


def by_depth(exact: NDArray[np.bool_], depths: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Exact match ``[Q]`` in each of :data:`DEPTH_BINS` parts of a text, by where the answers stood: ``depths [Q]``."""
    bins = np.minimum((depths * DEPTH_BINS).astype(int), DEPTH_BINS - 1)
    return [
        {
            "from": b / DEPTH_BINS,
            "to": (b + 1) / DEPTH_BINS,
            "questions": int((bins == b).sum()),
            "exact": float(exact[bins == b].mean()) if (bins == b).any() else None,
        }
        for b in range(DEPTH_BINS)
    ]


def lower_bound(right: int, asked: int) -> float:
    """Lower end of the 95% Wilson interval of a share."""
    z, share = 1.96, right / asked
    middle = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + (z / (2 * asked)) ** 2)
    return max(0.0, (middle - spread) / (1 + z * z / asked))


def peak_memory_mb() -> float:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
