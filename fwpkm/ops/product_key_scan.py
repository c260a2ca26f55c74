"""Addresses along chunks whose sub-keys move (DESIGN 2.1, 2.2, 2.7): address and key commit, chunk after chunk."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require, require_dtype, require_no_nan, require_shape
from fwpkm.ops._batching import fold
from fwpkm.ops._library import refuse_double_backward, register, register_backward
from fwpkm.ops.key_commit import _backward_cpu as commit_backward_cpu
from fwpkm.ops.key_commit import _cpu as commit_cpu
from fwpkm.ops.product_key_address import _backward_cpu as address_backward_cpu
from fwpkm.ops.product_key_address import _cpu as address_cpu
from fwpkm.ops.product_key_address import check_query_and_keys, own_keys_gradient


class Addresses(NamedTuple):
    """Where the tokens of a scan read, and the sub-keys after it."""

    scores: Tensor  # [M, S, P, H, k]
    slots: Tensor  # [M, S, P, H, k]
    sub_scores: Tensor  # [M, S, P, H, 2, k]
    sub_slots: Tensor  # [M, S, P, H, 2, k]
    keys: Tensor  # [M, H, 2, n, Dk/2]


def product_key_scan(
    query: Tensor,
    keys: Tensor,
    k: int,
    mask: Tensor,
    rate: float,
    score: str = "idw",
    eps: float = 1e-3,
    cut: Tensor | None = None,
) -> Addresses:
    """Address ``S`` chunks of ``P`` tokens in ``M`` memories whose sub-keys commit after every chunk.

    The same as :func:`product_key_address` and :func:`key_commit` in turn, as one operator whatever ``S`` is.

    Args:
        query: ``[M, S, P, H, Dk]``, dtype of ``keys``, bfloat16 or float16, as in :func:`product_key_address`.
        keys: ``[M, H, 2, n, Dk/2]``, or ``[1, ...]`` when the memories start from the same; float32 (float64 for
            numerical checks).
        k, score, eps: as in :func:`product_key_address`.
        mask: ``[M, S, P]`` bool, True for the tokens that a chunk's commit is made of; of none, keys stay.
        rate: as in :func:`key_commit`.
        cut: ``[M, S]`` bool, True where no gradient flows from a chunk's sub-keys to those before; None for nowhere.

    Returns:
        :class:`Addresses`, in the dtype of ``keys``. Gradients of ``scores``, ``sub_scores`` and ``keys`` flow to
        ``query``, in its dtype and rounded once, and ``keys``, through the commits too.

    Raises:
        ValueError: for a wrong shape, dtype, ``k``, ``score`` or ``eps``, or NaN.
    """
    require_shape("query", query, ("M", "S", "P", "H", "Dk"))
    check_query_and_keys(query.flatten(1, 2), keys, score)
    require(eps > 0, "eps", eps, "a positive number")
    require(1 <= k <= keys.shape[3], "k", k, "1 <= k <= n_subkeys ({})", keys.shape[3])
    require_shape("mask", mask, query.shape[:3])
    require_dtype("mask", mask, torch.bool)
    if cut is not None:
        require_shape("cut", cut, query.shape[:2])
        require_dtype("cut", cut, torch.bool)
    return Addresses(*_operator(query, keys, mask, cut, k, rate, score, eps)[:5])


def scan(
    address_chunk: Callable[..., tuple[Tensor, ...]],
    commit_chunk: Callable[..., Tensor],
    query: Tensor,
    keys: Tensor,
    mask: Tensor,
    k: int,
    rate: float,
    score: str,
    eps: float,
) -> tuple[Tensor, ...]:
    """The operator's outputs from implementations of its two parts: :class:`Addresses`, and the keys of every chunk."""
    memories, steps, tokens, heads, _ = query.shape
    shape = (memories, steps, tokens, heads, k)
    sub_shape = (*shape[:-1], 2, k)
    scores, sub_scores = keys.new_empty(shape), keys.new_empty(sub_shape)
    slots, sub_slots = (torch.empty_like(x, dtype=torch.int64) for x in (scores, sub_scores))
    versions = keys.new_empty(steps, memories, *keys.shape[1:])
    keys = keys.expand(memories, *keys.shape[1:])
    for s in range(steps):
        versions[s] = keys
        found = address_chunk(query[:, s], versions[s], k, score, eps)
        for whole, chunk in zip((scores, slots, sub_scores, sub_slots), found, strict=True):
            whole[:, s] = chunk
        keys = commit_chunk(query[:, s], versions[s], *found[2:], mask[:, s], rate, score)
    return scores, slots, sub_scores, sub_slots, keys.clone(memory_format=torch.contiguous_format), versions


def scan_backward(
    address_backward: Callable[..., tuple[Tensor, Tensor]],
    commit_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad_scores: Tensor,
    grad_sub_scores: Tensor,
    grad_keys: Tensor,
    query: Tensor,
    shared_keys: bool,
    slots: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    versions: Tensor,
    mask: Tensor,
    cut: Tensor | None,
    rate: float,
    score: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys from the backwards of both parts, the last chunk first."""
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad = grad_keys
    for s in reversed(range(query.shape[1])):
        chunk = query[:, s].to(versions.dtype), versions[s]  # both parts' gradients are rounded once, as a sum
        selected = sub_scores[:, s], sub_slots[:, s]
        by_commit, grad, of_scores = commit_backward(grad, *chunk, *selected, mask[:, s], rate, score)
        of_scores = of_scores + grad_sub_scores[:, s]
        by_address, of_keys = address_backward(grad_scores[:, s], of_scores, *chunk, slots[:, s], *selected, score)
        torch.add(by_commit, by_address, out=grad_query[:, s])
        grad = grad + of_keys
        if cut is not None:
            grad = grad.masked_fill(cut[:, s].view(-1, 1, 1, 1, 1), 0)
    return grad_query, grad.sum(0, keepdim=True) if shared_keys else grad.clone()


def _check(query: Tensor, keys: Tensor, *_: Any) -> None:
    for name, tensor in (("query", query), ("keys", keys)):
        require_no_nan(name, tensor)


def _cpu(
    query: Tensor, keys: Tensor, mask: Tensor, cut: Tensor | None, k: int, rate: float, score: str, eps: float
) -> tuple[Tensor, ...]:
    return scan(address_cpu, commit_cpu, query.to(keys.dtype), keys, mask, k, rate, score, eps)


def _fake(
    query: Tensor, keys: Tensor, mask: Tensor, cut: Tensor | None, k: int, rate: float, score: str, eps: float
) -> tuple[Tensor, ...]:
    memories, steps = query.shape[:2]
    shape = (*query.shape[:4], k)
    sub_shape = (*query.shape[:4], 2, k)
    slots = keys.new_empty(shape, dtype=torch.int64)
    sub_keys = keys.new_empty((memories, *keys.shape[1:]))
    versions = keys.new_empty((steps, memories, *keys.shape[1:]))
    return keys.new_empty(shape), slots, keys.new_empty(sub_shape), slots.new_empty(sub_shape), sub_keys, versions


def _backward_cpu(
    grad_scores: Tensor,
    grad_sub_scores: Tensor,
    grad_keys: Tensor,
    query: Tensor,
    keys: Tensor,
    slots: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    versions: Tensor,
    mask: Tensor,
    cut: Tensor | None,
    rate: float,
    score: str,
) -> tuple[Tensor, Tensor]:
    parts, shared = (address_backward_cpu, commit_backward_cpu), keys.shape[0] == 1
    found = slots, sub_scores, sub_slots, versions, mask
    return scan_backward(*parts, grad_scores, grad_sub_scores, grad_keys, query, shared, *found, cut, rate, score)


def _backward_fake(
    grad_scores: Tensor, grad_sub_scores: Tensor, grad_keys: Tensor, query: Tensor, keys: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, keys, mask, cut, _, ctx.rate, ctx.score, _ = inputs
    _, slots, sub_scores, sub_slots, _, versions = output
    ctx.mark_non_differentiable(slots, sub_slots, versions)
    ctx.save_for_backward(query, keys, slots, sub_scores, sub_slots, versions, mask, cut)


def _backward(
    ctx: Any, grad_scores: Tensor, _slots: Tensor, grad_sub_scores: Tensor, _sub: Tensor, grad_keys: Tensor, _v: Tensor
) -> Any:
    grads = grad_scores, grad_sub_scores, grad_keys
    return *_backward_operator(*grads, *ctx.saved_tensors, ctx.rate, ctx.score), *(None,) * 6


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    folded, sizes = fold(info, in_dims, args)
    *found, versions = _operator(*folded)
    return (*(x.unflatten(0, sizes) for x in found), versions.unflatten(1, sizes).movedim(1, 0)), 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    versions, dim = args[8], in_dims[8]
    if dim is not None:  # [S, M, ...] of each sample; what is folded has the memories first
        versions = versions.movedim(dim, 0).movedim(1, 2)
    by_memory = (*args[:8], versions if dim is not None else versions.movedim(0, 1), *args[9:])
    folded, sizes = fold(info, (*in_dims[:8], None if dim is None else 0, *in_dims[9:]), by_memory)
    folded[8] = folded[8].movedim(1, 0)
    grad_query, grad_keys = (x.unflatten(0, sizes) for x in _backward_operator(*folded))
    return (grad_query, own_keys_gradient(info, in_dims[4], args[4], grad_keys)), 0


def _flops(query: Sequence[int], keys: Sequence[int], k: int, **_: Any) -> int:
    """Every query with every sub-key of its codebooks, and its coefficients for those that it selected."""
    return 2 * prod(query) * (keys[3] + k)


def _backward_flops(query: Sequence[int], sub_slots: Sequence[int], **_: Any) -> int:
    return 8 * prod(query) * sub_slots[-1]


_operator = register(
    "product_key_scan(Tensor query, Tensor keys, Tensor mask, Tensor? cut, int k, float rate, str score, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _cpu,
    "fwpkm.ops.cuda.product_key_scan:forward",
    _fake,
    _flops,
    _check,
)
_backward_operator = register(
    "product_key_scan_backward(Tensor grad_scores, Tensor grad_sub_scores, Tensor grad_keys, Tensor query, Tensor keys,"
    " Tensor slots, Tensor sub_scores, Tensor sub_slots, Tensor versions, Tensor mask, Tensor? cut, float rate,"
    " str score) -> (Tensor, Tensor)",
    _backward_cpu,
    "fwpkm.ops.cuda.product_key_scan:backward",
    _backward_fake,
    _backward_flops,
)
register_backward(_operator, _backward, _setup_context, _vmap)
refuse_double_backward(_backward_operator, _backward_vmap)
