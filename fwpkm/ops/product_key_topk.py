"""Product-key top-k (DESIGN 2.2; Lample et al. 2019): the best ``k`` of ``n * n`` slots from two rankings of ``n``."""

from typing import Any

import torch
from torch import Tensor

from fwpkm.checks import require, require_fast_weight_dtype
from fwpkm.ops._batching import batch_first
from fwpkm.ops._library import refuse_double_backward, register, register_backward

_GROUP = 8


def product_key_topk(sub_scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pick the ``k`` slots with the largest sums of two sub-scores, one a codebook.

    Ties go to the lower sub-key within a codebook, then to the lower row-major position in the ``k x k`` grid of ranks.

    Args:
        sub_scores: ``[..., H, 2, n]``, float32 (float64 for numerical checks).
        k: slots a head, ``1 <= k <= n``.

    Returns:
        ``scores [..., H, k]`` descending; ``slots [..., H, k]`` int64, slot ``i * n + j`` of sub-keys ``i`` and ``j``;
        ``sub_slots [..., H, 2, k]`` int64, each codebook's best sub-keys, best first. The gradient of ``scores`` flows
        to the selected sub-scores.

    Raises:
        ValueError: for a wrong shape or dtype, or ``k`` outside ``[1, n]``.
    """
    halves = sub_scores.dim() >= 3 and sub_scores.shape[-2] == 2
    require(halves, "sub_scores.shape", sub_scores.shape, "[..., heads, 2, n_subkeys]")
    require_fast_weight_dtype("sub_scores", sub_scores)
    require(1 <= k <= sub_scores.shape[-1], "k", k, "1 <= k <= n_subkeys ({})", sub_scores.shape[-1])
    return _operator(sub_scores, k)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row of ``x [R, n]``, descending, of equal ones the lower index first."""
    n = x.shape[-1]
    values, index = _top(x, min(k + 1, n))
    # topk takes any of several equal elements: rows whose last place is contested are sorted whole instead.
    contested = (
        (values[:, k] == values[:, k - 1]).nonzero().squeeze(-1) if k < n else values.new_empty(0, dtype=torch.int64)
    )
    index, rank = index[:, :k].sort(dim=-1)
    values, order = values[:, :k].gather(-1, rank).sort(dim=-1, descending=True, stable=True)
    index = index.gather(-1, order)
    if contested.numel():
        values_whole, index_whole = x[contested].sort(dim=-1, descending=True, stable=True)
        values[contested], index[contested] = values_whole[:, :k], index_whole[:, :k]
    return values, index


def _top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``x.topk(k)`` of rows ``[R, n]``. The best ``k`` are in the ``k`` groups with the largest best elements."""
    n = x.shape[-1]
    if n % _GROUP or n < 2 * _GROUP * k:
        return x.topk(k, dim=-1)
    stride = n // _GROUP  # a group's elements lie that far apart, so that all groups are compared at once
    groups = x.unflatten(-1, (_GROUP, stride)).amax(1).topk(k, dim=-1, sorted=False).indices
    members = (groups.unsqueeze(1) + (torch.arange(_GROUP, device=x.device) * stride).unsqueeze(1)).flatten(1)
    values, place = x.gather(-1, members).topk(k, dim=-1)
    return values, members.gather(-1, place)


def combine(sub_values: Tensor, sub_slots: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best pairs of two descending lists ``[R, 2, k]`` -> ``scores``, ``slots [R, k]``.

    Pair ``(i, j)`` is beaten or tied, at a lower grid position, by the ``(i+1)(j+1) - 1`` pairs that dominate it, so
    only pairs with ``(i+1)(j+1) <= k`` can be among the best ``k``.
    """
    k = sub_values.shape[-1]
    rank = torch.arange(k, device=sub_values.device)
    first, second = ((rank[:, None] + 1) * (rank + 1) <= k).nonzero().unbind(-1)
    scores, position = largest(sub_values[:, 0, first] + sub_values[:, 1, second], k)
    slots = sub_slots[:, 0].gather(-1, first[position]) * n + sub_slots[:, 1].gather(-1, second[position])
    return scores, slots


def selected_gradient(grad_scores: Tensor, slots: Tensor, sub_slots: Tensor, n: int) -> Tensor:
    """The gradient of ``scores [..., k]``, handed to the sub-scores ``[..., 2, k]`` whose sub-keys are in a slot."""
    halves = torch.stack((slots // n, slots % n), dim=-2)
    used = sub_slots.unsqueeze(-1) == halves.unsqueeze(-2)
    return torch.matmul(used.to(grad_scores.dtype), grad_scores[..., None, :, None]).squeeze(-1)


def _cpu(sub_scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    *leading, _, n = sub_scores.shape
    sub_values, sub_slots = largest(sub_scores.reshape(-1, n), k)
    sub_slots = sub_slots.view(-1, 2, k)
    scores, slots = combine(sub_values.view(-1, 2, k), sub_slots, n)
    return scores.view(*leading, k), slots.view(*leading, k), sub_slots.view(*leading, 2, k)


def _fake(sub_scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    leading = sub_scores.shape[:-2]
    slots = sub_scores.new_empty((*leading, k), dtype=torch.int64)
    return sub_scores.new_empty((*leading, k)), slots, slots.new_empty((*leading, 2, k))


def _backward_cpu(grad_scores: Tensor, slots: Tensor, sub_slots: Tensor, n: int) -> Tensor:
    grad_sub = selected_gradient(grad_scores, slots, sub_slots, n)
    return grad_sub.new_zeros((*grad_sub.shape[:-1], n)).scatter_(-1, sub_slots, grad_sub)


def _backward_fake(grad_scores: Tensor, slots: Tensor, sub_slots: Tensor, n: int) -> Tensor:
    return grad_scores.new_empty((*sub_slots.shape[:-1], n))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, slots, sub_slots = output
    ctx.mark_non_differentiable(slots, sub_slots)
    ctx.save_for_backward(slots, sub_slots)
    ctx.n = inputs[0].shape[-1]


def _backward(ctx: Any, grad_scores: Tensor, _slots: Tensor, _sub_slots: Tensor) -> tuple[Tensor, None]:
    return _backward_operator(grad_scores, *ctx.saved_tensors, ctx.n), None


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _operator(*batch_first(info, in_dims, args)), 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _backward_operator(*batch_first(info, in_dims, args)), 0


def _flops(**_: Any) -> int:
    """Scores are compared and added, and gradients moved: no products."""
    return 0


_operator = register(
    "product_key_topk(Tensor sub_scores, int k) -> (Tensor, Tensor, Tensor)",
    _cpu,
    "fwpkm.ops.cuda.product_key_topk:forward",
    _fake,
    _flops,
)
_backward_operator = register(
    "product_key_topk_backward(Tensor grad_scores, Tensor slots, Tensor sub_slots, SymInt n) -> Tensor",
    _backward_cpu,
    "fwpkm.ops.cuda.product_key_topk:backward",
    _backward_fake,
    _flops,
)
register_backward(_operator, _backward, _setup_context, _vmap)
refuse_double_backward(_backward_operator, _backward_vmap)
