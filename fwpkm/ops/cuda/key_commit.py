"""Key commit on a GPU: the coefficients of the selected sub-keys, then their sums, sub-key by sub-key."""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.ops.cuda._rows import Segments
from fwpkm.ops.cuda._selected import Selected
from fwpkm.ops.kernels.commit_coefficients import commit_coefficients
from fwpkm.ops.kernels.commit_score_gradient import commit_score_gradient
from fwpkm.ops.kernels.commit_usage_gradient import commit_usage_gradient
from fwpkm.ops.kernels.selected_softmax import selected_softmax


class _Step(NamedTuple):
    """What forward and backward share: who selected what, how much it was used, and the step's coefficients."""

    selected: Selected
    segments: Segments
    halves: Tensor  # [R, d] halves of queries
    pairs: Tensor  # [M] (token, head) pairs that count
    usage: Tensor  # p-bar [M, 2, n]
    coefficients: Tensor  # [R, k] of q - K (idw) or q (dot) in dL/dK


def _step(
    query: Tensor, n: int, sub_scores: Tensor, sub_slots: Tensor, mask: Tensor | None, score: str
) -> tuple[_Step, Tensor, Tensor, Tensor | None]:
    """The step, and its inputs ``sub_scores``, ``sub_slots`` and ``mask`` as kernels take them."""
    memories, tokens, heads, width = query.shape
    sub_scores, sub_slots = sub_scores.contiguous(), sub_slots.contiguous()
    if mask is None:
        pairs = sub_scores.new_full((memories,), max(tokens * heads, 1))
    else:
        mask = mask.contiguous()
        pairs = (mask.sum(1, dtype=sub_scores.dtype) * heads).clamp_min(1)  # no token: no usage, no step
    selected = Selected.of(sub_slots, memories, n, mask)
    segments = selected.by_subkey()
    out = torch.empty_like(sub_scores)
    selected_softmax(out, sub_scores, mask)
    usage = _over_heads(selected.sums(segments, out), memories, heads) / pairs.view(-1, 1, 1)
    commit_coefficients(out, sub_scores, sub_slots, mask, usage, pairs, score)
    halves = query.reshape(-1, width // 2).contiguous()
    step = _Step(selected, segments, halves, pairs, usage, out.view(-1, out.shape[-1]))
    return step, sub_scores, sub_slots, mask


def _over_heads(sums: Tensor, memories: int, heads: int) -> Tensor:
    """Sums of all sub-keys ``[M * H * 2 * n, 1]``, added up over heads: ``[M, 2, n]``."""
    return sums.view(memories, heads, 2, -1).sum(1)


def forward(
    query: Tensor, keys: Tensor, sub_scores: Tensor, sub_slots: Tensor, mask: Tensor | None, rate: float, score: str
) -> Tensor:
    memories, n = query.shape[0], keys.shape[3]
    step, *_ = _step(query, n, sub_scores, sub_slots, mask, score)
    start = keys.contiguous().expand(memories, *keys.shape[1:])
    gradient = step.selected.transposed_times(step.segments, step.coefficients, step.halves).view(start.shape)
    if score == "idw":
        sums = step.selected.sums(step.segments, step.coefficients).view(*start.shape[:-1], 1)
        gradient = torch.addcmul(gradient, sums, start, value=-1)
    return torch.sub(start, gradient, alpha=rate)


def backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    mask: Tensor | None,
    rate: float,
    score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    memories, _, heads, _ = query.shape
    n, half = keys.shape[3:]
    step, sub_scores, sub_slots, mask = _step(query, n, sub_scores, sub_slots, mask, score)
    selected, segments, coefficients = step.selected, step.segments, step.coefficients
    grad = grad.contiguous()
    grad_rows = grad.view(-1, half)

    grad_query = (selected.times(coefficients, grad_rows) * -rate).view(query.shape).to(query.dtype)
    if score == "idw":
        sums = selected.sums(segments, coefficients).view(*grad.shape[:-1], 1)
        grad_keys = torch.addcmul(grad, sums, grad, value=rate)
        key_products = (keys * grad).sum(-1)
    else:
        grad_keys, key_products = grad.clone(), None
    if keys.shape[0] == 1:
        grad_keys = grad_keys.sum(0, keepdim=True)

    grad_gradient, grad_pull, grad_scores = (torch.empty_like(sub_scores) for _ in range(3))
    query_products = selected.products(step.halves, grad_rows)
    commit_usage_gradient(
        grad_gradient, grad_pull, query_products, key_products, selected.entries, sub_scores, mask, rate
    )
    totals = _over_heads(selected.sums(segments, grad_pull), memories, heads)
    commit_score_gradient(
        grad_scores, grad_gradient, totals, sub_scores, sub_slots, mask, step.usage, step.pairs, score
    )
    return grad_query, grad_keys, grad_scores
