"""Perplexity of plain text, streamed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fwpkm.checks import require
from fwpkm.data.text import Bytes
from fwpkm.models import FwPKMCache, FwPKMForCausalLM


@torch.no_grad()
def perplexity(model: FwPKMForCausalLM, text: Bytes, rows: int = 8, call: int = 4096) -> dict[str, Any]:
    """Cross entropy of ``text`` in nats a byte, read as ``rows`` equally long pieces side by side."""
    length = text.size // rows
    require(length > 1, "text", f"{text.size} bytes long", "at least {} bytes", 2 * rows)
    model.eval()
    tokens = torch.from_numpy(text[: rows * length].copy()).view(rows, length).long()
    cache, total = FwPKMCache(model.config), 0.0
    for first in range(0, length, call):
        logits = model(tokens[:, first : first + call], past_key_values=cache).logits
        targets = tokens[:, first + 1 : first + call + 1]
        predicted = logits[:, : targets.shape[1]]
        total += cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="sum").item()
    loss = total / (rows * (length - 1))
    return {"bytes": rows * length, "loss": loss, "perplexity": math.exp(loss)}
