"""Perplexity of plain text, streamed, in all and by position."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fwpkm.checks import require
from fwpkm.data.codec import TokenArray
from fwpkm.evaluation.stream import OnTokens, ignored, stream
from fwpkm.models import FwPKMForCausalLM

FIRST_BIN = 64


def perplexity(
    model: FwPKMForCausalLM,
    tokens: TokenArray,
    rows: int = 8,
    call: int = 4096,
    bytes_per_token: float = 1.0,
    resets: Collection[int] = (),
) -> dict[str, Any]:
    """Cross entropy of ``tokens [T]``, read as ``rows`` equally long pieces side by side.

    ``resets`` are the positions in the pieces at which the memories return to the base values.

    Returns:
        ``tokens`` and ``bytes`` read, ``loss`` in nats a token, ``nats_per_byte``, and ``perplexity`` a token.
    """
    pieces = side_by_side(tokens, rows)
    return summary(token_losses(model, pieces, call, resets=resets), pieces, bytes_per_token)


def side_by_side(tokens: TokenArray, rows: int) -> Tensor:
    """``[T]`` -> ``[rows, T // rows]`` int64."""
    length = tokens.size // rows
    require(length > 1, "text", f"{tokens.size} tokens long", "at least {} tokens", 2 * rows)
    return torch.from_numpy(tokens[: rows * length].astype("int64")).view(rows, length)


def token_losses(
    model: FwPKMForCausalLM,
    pieces: Tensor,
    call: int = 4096,
    on_tokens: OnTokens = ignored,
    resets: Collection[int] = (),
) -> Tensor:
    """``[rows, T]`` -> ``[rows, T - 1]``: the cross entropy of each token but the first, in nats, on the CPU.

    Arguments as in :func:`fwpkm.evaluation.stream.stream`. The last token is only predicted, not read.
    """
    losses = [torch.empty(pieces.shape[0], 0)]
    for read, result in stream(model, pieces[:, :-1], call, on_tokens, resets):
        targets = pieces[:, read.start + 1 : read.stop + 1].to(model.device, torch.int64)
        loss = cross_entropy(result.logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view_as(targets).cpu())
    return torch.cat(losses, 1)


def by_position(losses: Tensor) -> list[dict[str, Any]]:
    """:func:`token_losses` by how many tokens were read before: less than 64, and on to powers of two.

    Returns:
        for each bin ``from`` and ``to`` (positions of the predicted tokens, ``to`` exclusive), ``tokens``, their mean
        ``loss`` in nats, and ``perplexity``.
    """
    length = losses.shape[1] + 1
    edges = [1]
    while edges[-1] < length:
        edges.append(min(length, max(FIRST_BIN, 2 * edges[-1])))
    bins = []
    for first, last in pairwise(edges):
        part = losses[:, first - 1 : last - 1].double()  # the first token of a piece is not predicted
        loss = float(part.mean())  # on the CPU
        bins.append({"from": first, "to": last, "tokens": part.numel(), "loss": loss, "perplexity": math.exp(loss)})
    return bins


def summary(losses: Tensor, pieces: Tensor, bytes_per_token: float) -> dict[str, Any]:
    """What :func:`perplexity` returns, from the :func:`token_losses` of ``pieces``, or the sum of them in parts."""
    rows, length = pieces.shape
    loss = float(losses.double().sum()) / (rows * (length - 1))
    return {
        "tokens": rows * length,
        "bytes": round(rows * length * bytes_per_token),
        "loss": loss,
        "nats_per_byte": loss / bytes_per_token,
        "perplexity": math.exp(loss),
    }
