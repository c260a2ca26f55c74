"""How much of a text the memories store: the distribution of their gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.evaluation.stream import OnTokens, ignored, stream
from fwpkm.models import FwPKMForCausalLM

BINS = 20


def gates(
    model: FwPKMForCausalLM, tokens: Tensor, call: int = 4096, on_tokens: OnTokens = ignored
) -> list[dict[str, Any]]:
    """The gates of each memory layer while a model reads ``tokens [rows, T]``.

    Returns:
        for each layer the number of its ``block``, the ``mean`` gate, and a ``histogram``: the share of gates in each
        of :data:`BINS` equal parts of [0, 1].

    Raises:
        ValueError: if the model has no memory.
    """
    blocks = model.config.fwpkm_layers or []
    require(bool(blocks), "model.config.fwpkm_layers", blocks, "a block with a memory")
    counts = torch.zeros(len(blocks), BINS, dtype=torch.int64)
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    for _, result in stream(model, tokens, call, on_tokens):
        for i, gate in enumerate(result.gates or ()):
            place = (gate * BINS).long().clamp(max=BINS - 1)
            counts[i] += torch.bincount(place.flatten().cpu(), minlength=BINS)
            sums[i] += gate.double().sum().cpu()
    shares, means = counts.double() / tokens.numel(), sums / tokens.numel()
    return [
        {"block": block, "mean": mean, "histogram": histogram}
        for block, mean, histogram in zip(sorted(blocks), means.tolist(), shares.tolist(), strict=True)
    ]
