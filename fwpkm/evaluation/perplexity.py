"""Perplexity of plain text, streamed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fwpkm.checks import require
from fwpkm.data.codec import TokenArray
from fwpkm.models import FwPKMCache, FwPKMForCausalLM


def perplexity(
    model: FwPKMForCausalLM,
    tokens: TokenArray,
    rows: int = 8,
    call: int = 4096,
    bytes_per_token: float = 1.0,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Cross entropy of ``tokens [T]``, read as ``rows`` equally long pieces side by side.

    ``on_tokens`` is told after each call how many tokens were read.

    Returns:
        ``tokens`` and ``bytes`` read, ``loss`` in nats a token, ``nats_per_byte``, and ``perplexity`` a token.
    """
    pieces = side_by_side(tokens, rows)
    return summary(cross_entropy_sum(model, pieces, call, on_tokens), pieces, bytes_per_token)


def side_by_side(tokens: TokenArray, rows: int) -> Tensor:
    """``[T]`` -> ``[rows, T // rows]`` int64."""
    length = tokens.size // rows
    require(length > 1, "text", f"{tokens.size} tokens long", "at least {} tokens", 2 * rows)
    return torch.from_numpy(tokens[: rows * length].astype("int64")).view(rows, length)


@torch.no_grad()
def cross_entropy_sum(
    model: FwPKMForCausalLM, pieces: Tensor, call: int, on_tokens: Callable[[int], None] = lambda count: None
) -> float:
    """Sum over ``pieces [rows, T]`` of the cross entropy of each token but the first, in nats, ``call`` at a time."""
    model.eval()
    cache, total = FwPKMCache(model.config), 0.0
    for first in range(0, pieces.shape[1] - 1, call):
        piece = pieces[:, first : first + call + 1].to(model.device)
        logits = model(piece[:, :call], past_key_values=cache).logits
        targets = piece[:, 1:]
        predicted = logits[:, : targets.shape[1]].flatten(0, 1)
        total += cross_entropy(predicted.float(), targets.flatten(), reduction="sum").item()
        on_tokens(piece.numel())
    return total


def summary(total: float, pieces: Tensor, bytes_per_token: float) -> dict[str, Any]:
    """What :func:`perplexity` returns, from the sum of the cross entropy of all ``pieces``."""
    rows, length = pieces.shape
    loss = total / (rows * (length - 1))
    return {
        "tokens": rows * length,
        "bytes": round(rows * length * bytes_per_token),
        "loss": loss,
        "nats_per_byte": loss / bytes_per_token,
        "perplexity": math.exp(loss),
    }
