"""Product-key top-k on a GPU: the best of each half, then the best of their sums."""

import torch
from torch import Tensor

from fwpkm.ops.kernels.combine_halves import combine_halves
from fwpkm.ops.kernels.select_scores import select_scores
from fwpkm.ops.kernels.selected_gradient import selected_gradient


def forward(sub_scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    *leading, _, n = sub_scores.shape
    best = sub_scores.new_empty((*leading, 2, k))
    sub_slots = torch.empty_like(best, dtype=torch.int64)
    select_scores(best.view(-1, k), sub_slots.view(-1, k), sub_scores.reshape(-1, n).contiguous())
    return *combined(best, sub_slots, n), sub_slots


def combined(sub_scores: Tensor, sub_slots: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The best pairs of both halves' best, ``[..., 2, k]`` -> ``scores``, ``slots [..., k]``."""
    *leading, _, k = sub_scores.shape
    scores = sub_scores.new_empty((*leading, k))
    slots = torch.empty_like(scores, dtype=torch.int64)
    combine_halves(scores.view(-1, k), slots.view(-1, k), sub_scores.view(-1, 2, k), sub_slots.view(-1, 2, k), n)
    return scores, slots


def backward(grad_scores: Tensor, slots: Tensor, sub_slots: Tensor, n: int) -> Tensor:
    grad = grad_scores.new_empty(sub_slots.shape)
    sub_slots = sub_slots.contiguous()
    selected_gradient(grad, grad_scores.contiguous(), slots.contiguous(), sub_slots, n)
    return grad.new_zeros((*grad.shape[:-1], n)).scatter_(-1, sub_slots, grad)
