"""Rows of which every one has its own order: what masks and packed sequences are computed with."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, i]]``: ``[B, T, ...]``, ``[B, I]`` -> ``[B, I, ...]``."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), index]


def unmasked_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The order ``[B, T]`` that puts each row's unmasked positions first, as they come; and the way back."""
    order = mask.logical_not().sort(dim=1, stable=True).indices
    return order, order.argsort(dim=1)


def last(kept: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """Of ``kept [B, W, ...]`` and the first ``count [B]`` of ``new [B, T, ...]`` each row's last ``W``."""
    index = count.unsqueeze(1) + torch.arange(kept.shape[1], device=count.device)
    return rows(torch.cat((kept, new), 1), index)


def following(past: Tensor, new: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """The last inputs ``[B, W, ...]`` of each row after ``past [B, W, D]`` and ``new [B, T, D]``.

    They are those of its last sequence, and zeros before it; ``mask`` and ``starts`` ``[B, T]`` say which tokens are
    real and which of them begin a sequence.
    """
    if mask is None and starts is None:
        return torch.cat((past, new), 1)[:, new.shape[1] :]
    if starts is not None:
        sequence = starts.cumsum(1)
        new = torch.where((sequence == sequence[:, -1:]).unsqueeze(-1), new, 0)
        past = torch.where((sequence[:, -1] == 0).view(-1, 1, 1), past, 0)
    count = torch.full(new.shape[:1], new.shape[1], device=new.device)
    if mask is not None:
        new, count = rows(new, unmasked_first(mask)[0]), mask.sum(1)
    return last(past, new, count)
