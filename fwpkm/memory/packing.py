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
