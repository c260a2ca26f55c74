"""Adaptation to a text, and what is left of it after another: perplexity while a model reads A, B, and A again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.data.codec import TokenArray
from fwpkm.evaluation.perplexity import side_by_side, token_losses
from fwpkm.evaluation.stream import OnTokens, ignored
from fwpkm.models import FwPKMForCausalLM


def adaptation(
    model: FwPKMForCausalLM,
    a: TokenArray,
    b: TokenArray,
    length: int = 1 << 14,
    rows: int = 4,
    piece: int = 1 << 10,
    call: int = 4096,
    on_tokens: OnTokens = ignored,
) -> dict[str, Any]:
    """Read ``length`` tokens of A, as many of B, and the same of A again, in one go, for ``rows`` texts side by side.

    How much better A is predicted the second time tells what the model has kept of it. Another model of the same state
    reads A twice without B in between, which tells what there was to keep.

    Args:
        model: as it is; :func:`fwpkm.evaluation.memory.never_written` gives the one whose memories are off.
        a: tokens ``[>= rows * length]`` of a domain.
        b: of another.
        length: of each text.
        rows: different texts of each domain.
        piece: tokens that a point of the curve is the mean of.
        call: tokens that are read at a time.
        on_tokens: told after each call how many tokens were read, of ``5 * rows * length`` in all.

    Returns:
        ``curve``: the mean ``loss`` in nats a token of each piece of A, B, A: its ``text`` (``"A"`` or ``"B"``),
        ``from`` and ``to`` (positions in the whole, ``to`` exclusive); the first token of a text counts nowhere. Mean
        losses of the text of A without its first piece, before which attention had nothing to look at: ``first``, when
        it was new; ``again``, right after that; ``after``, after B. ``kept``: the share of the gain from reading A that
        is left after B, ``(first - after) / (first - again)``, or None without a gain.

    Raises:
        ValueError: for a text shorter than ``rows * length``, or lengths that do not fit each other.
    """
    require(rows >= 1, "rows", rows, "a positive integer")
    require(length >= 3, "length", length, "at least 3")
    require(1 <= piece < length - 1, "piece", piece, "in [1, {}), so that a text has more than one", length - 1)
    first, other = (_rows(name, tokens, rows, length) for name, tokens in (("a", a), ("b", b)))
    in_between = token_losses(model, torch.cat((first, other, first), 1), call, on_tokens)
    at_once = token_losses(model, torch.cat((first, first), 1), call, on_tokens)
    new, again, after = (
        _mean(_of_text(losses, i, length)[:, piece:]) for losses, i in ((in_between, 0), (at_once, 1), (in_between, 2))
    )
    curve = []
    for i, text in enumerate("ABA"):
        start = i * length + 1
        for part in _of_text(in_between, i, length).split(piece, 1):
            curve.append({"text": text, "from": start, "to": start + part.shape[1], "loss": _mean(part)})
            start += part.shape[1]
    kept = (new - after) / (new - again) if again < new else None
    return {"curve": curve, "first": new, "again": again, "after": after, "kept": kept}


def _of_text(losses: Tensor, i: int, length: int) -> Tensor:
    """The losses of the ``i``-th text but for its first token ``[rows, length - 1]``."""
    return losses[:, i * length : (i + 1) * length - 1]


def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())  # on the CPU


def _rows(name: str, tokens: TokenArray, rows: int, length: int) -> Tensor:
    need = rows * length
    require(tokens.size >= need, name, f"{tokens.size} tokens long", "at least {}, {} times {}", need, rows, length)
    return side_by_side(tokens[:need], rows)
