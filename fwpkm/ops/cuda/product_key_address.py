"""Addresses on a GPU: scoring fused with the top-k of a codebook, and gradients on the selected sub-keys only."""

import torch
from torch import Tensor

from fwpkm.ops.cuda._selected import Selected
from fwpkm.ops.cuda.product_key_topk import combined
from fwpkm.ops.kernels.select_subkeys import select_subkeys
from fwpkm.ops.kernels.selected_gradient import selected_gradient


def forward(
    query: Tensor, keys: Tensor, k: int, score: str, eps: float, sub_scores_reach_query: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    memories, tokens, heads, width = query.shape
    n = keys.shape[3]
    sub_scores = keys.new_empty(memories, tokens, heads, 2, k)
    sub_slots = torch.empty_like(sub_scores, dtype=torch.int64)
    query = query if query.stride(3) == 1 else query.contiguous()
    best, best_slots = sub_scores, sub_slots
    if keys.shape[0] == 1:  # memories that share sub-keys share tiles
        query = query.reshape(1, memories * tokens, heads, width)
        best, best_slots = (x.view(1, memories * tokens, heads, 2, k) for x in (best, best_slots))
    select_subkeys(best, best_slots, query, keys.contiguous(), score, eps)
    return *combined(sub_scores, sub_slots, n), sub_scores, sub_slots


def backward(
    grad_scores: Tensor,
    grad_sub_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    slots: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    score: str,
    sub_scores_reach_query: bool = True,
) -> tuple[Tensor, Tensor]:
    n, half, k = keys.shape[3], keys.shape[4], slots.shape[3]
    idw_sub_scores = sub_scores.contiguous() if score == "idw" else None
    grad_scores, slots, sub_slots = (x.contiguous() for x in (grad_scores, slots, sub_slots))

    def coefficients(grad_sub_scores: Tensor) -> Tensor:
        out = torch.empty_like(sub_scores, memory_format=torch.contiguous_format)
        selected_gradient(out, grad_scores, slots, sub_slots, n, grad_sub_scores.contiguous(), idw_sub_scores)
        return out.view(-1, k)

    of_keys = coefficients(grad_sub_scores)
    of_halves = of_keys if sub_scores_reach_query else coefficients(torch.zeros_like(grad_sub_scores))

    halves, subkeys = query.reshape(-1, half).contiguous(), keys.reshape(-1, half).contiguous()
    selected = Selected.of(sub_slots, keys.shape[0], n)
    segments = selected.by_subkey()
    grad_halves = selected.times(of_halves, subkeys)
    grad_keys = selected.transposed_times(segments, of_keys, halves)
    if score == "idw":  # the coefficients are those of q - K
        grad_halves = torch.addcmul(-grad_halves, of_halves.sum(-1, keepdim=True), halves)
        grad_keys = torch.addcmul(-grad_keys, selected.sums(segments, of_keys), subkeys)
    return grad_halves.view(query.shape).to(query.dtype), grad_keys.view(keys.shape)
