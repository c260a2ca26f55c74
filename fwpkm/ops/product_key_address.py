"""Addresses (DESIGN 2.1 and 2.2): sub-scores of a query against both codebooks, and their product-key top-k."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fwpkm.checks import (
    require,
    require_choice,
    require_fast_weight_dtype,
    require_input_dtype,
    require_no_nan,
    require_shape,
)
from fwpkm.ops._batching import batch_first, fold
from fwpkm.ops._library import refuse_double_backward, register, register_backward
from fwpkm.ops._selected import Selected
from fwpkm.ops.product_key_topk import combine, largest, selected_gradient

SCORES = ("idw", "dot")
_BLOCK = 1 << 21  # sub-scores held at once: 8 MB, about a core's share of the cache


def product_key_address(
    query: Tensor,
    keys: Tensor,
    k: int,
    score: str = "idw",
    eps: float = 1e-3,
    sub_scores_reach_query: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score every query against its memory's sub-keys and pick the ``k`` best slots a head.

    Args:
        query: ``[M, P, H, Dk]``, dtype of ``keys``, bfloat16 or float16. Half precision is converted when it is loaded:
            the result is that of the converted query, bit for bit.
        keys: ``[M, H, 2, n, Dk/2]``, or ``[1, H, 2, n, Dk/2]`` when the memories share them; float32 (float64 for
            numerical checks).
        k: slots a head, ``1 <= k <= n``.
        score: ``"idw"``, ``-log(eps + ||q - K_i||^2)``, or ``"dot"``, ``q . K_i``.
        eps: of the inverse distance weighting, positive.
        sub_scores_reach_query: whether gradients of ``sub_scores`` flow to ``query`` too. A loss that is to shape the
            sub-keys alone, such as the addressing loss of sub-keys that are parameters, turns that off.

    Returns:
        ``scores [M, P, H, k]`` and ``slots [M, P, H, k]`` (int64) as :func:`product_key_topk` gives them, and of the
        selected sub-keys ``sub_scores`` and ``sub_slots [M, P, H, 2, k]``; scores in the dtype of ``keys``. Gradients
        of both scores flow to ``keys`` and, unless turned off, to ``query``, in its dtype and rounded once.

    Raises:
        ValueError: for a wrong shape, dtype, ``k``, ``score`` or ``eps``, or NaN.
    """
    check_query_and_keys(query, keys, score)
    require(eps > 0, "eps", eps, "a positive number")
    require(1 <= k <= keys.shape[3], "k", k, "1 <= k <= n_subkeys ({})", keys.shape[3])
    return _operator(query, keys, k, score, eps, sub_scores_reach_query)


def check_query_and_keys(query: Tensor, keys: Tensor, score: str) -> None:
    """The checks that operators on queries and sub-keys share."""
    require_shape("query", query, ("M", "P", "H", "Dk"))
    memories, _, heads, width = query.shape
    require(width % 2 == 0, "query.shape[-1]", width, "an even key width Dk, one half a codebook")
    require_shape("keys", keys, ("M or 1", heads, 2, "n", width // 2))
    require(keys.shape[0] in (1, memories), "keys.shape[0]", keys.shape[0], "1 or the {} memories of query", memories)
    require_fast_weight_dtype("keys", keys)
    require_input_dtype("query", query, keys.dtype)
    require_choice("score", score, SCORES)


def by_codebook(query: Tensor, shared_keys: bool) -> Tensor:
    """Queries ``[M, P, H, Dk]`` a codebook: ``[G, R, Dk/2]``, ``G`` codebooks as in ``keys.flatten(0, 2)``."""
    pattern = "m p h (c d) -> (h c) (m p) d" if shared_keys else "m p h (c d) -> (m h c) p d"
    return rearrange(query, pattern, c=2)


def selected_by_codebook(selected: Tensor, shared_keys: bool) -> Tensor:
    """The same for what was selected: ``[M, P, H, 2, k]`` -> ``[G, R, k]``."""
    return rearrange(selected, "m p h c k -> (h c) (m p) k" if shared_keys else "m p h c k -> (m h c) p k")


def _check(query: Tensor, keys: Tensor, *_: Any) -> None:
    for tensor in (query, keys):
        require_no_nan("query or keys", tensor)


def _cpu(
    query: Tensor, keys: Tensor, k: int, score: str, eps: float, sub_scores_reach_query: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    memories, tokens, heads, _ = query.shape
    shared = keys.shape[0] == 1
    rows, keys = by_codebook(query.to(keys.dtype), shared), keys.flatten(0, 2)
    n = keys.shape[1]
    selected = [_select(rows[:, block], keys, k, score, eps) for block in _blocks(rows.shape[0], rows.shape[1], n)]
    sub_scores, sub_slots = (torch.cat(parts, dim=1) for parts in zip(*selected, strict=True))
    pattern = "(h c) (m p) k -> m p h c k" if shared else "(m h c) p k -> m p h c k"
    sizes = {"m": memories, "p": tokens, "h": heads, "c": 2}
    sub_scores, sub_slots = (rearrange(x, pattern, **sizes).contiguous() for x in (sub_scores, sub_slots))
    require_no_nan("query or keys", sub_scores)  # a NaN among them is among the best
    scores, slots = combine(sub_scores.view(-1, 2, k), sub_slots.view(-1, 2, k), n)
    shape = (memories, tokens, heads, k)
    return scores.view(shape), slots.view(shape), sub_scores, sub_slots


def _blocks(codebooks: int, rows: int, n: int) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, codebooks * n))
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))


def _select(rows: Tensor, keys: Tensor, k: int, score: str, eps: float) -> tuple[Tensor, Tensor]:
    """Best sub-keys of rows ``[G, R, d]`` among ``keys [G, n, d]``: sub-scores and indices ``[G, R, k]``."""
    shape = (*rows.shape[:2], k)
    if score == "dot":
        sub_scores, sub_slots = largest(torch.bmm(rows, keys.mT).flatten(0, 1), k)
        return sub_scores.view(shape), sub_slots.view(shape)
    # ||q||^2 is the same for all sub-keys of a row: rank by 2 q.K - ||K||^2, and add it to the selected only.
    nearness = torch.baddbmm(-keys.square().sum(-1).unsqueeze(1), rows, keys.mT, alpha=2)
    nearness, sub_slots = (x.view(shape) for x in largest(nearness.flatten(0, 1), k))
    squared_distance = (rows.square().sum(-1, keepdim=True) - nearness).clamp_min_(0)
    return squared_distance.add_(eps).log_().neg_(), sub_slots


def _fake(
    query: Tensor, keys: Tensor, k: int, score: str, eps: float, sub_scores_reach_query: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*query.shape[:3], k)
    sub_shape = (*query.shape[:3], 2, k)
    slots = keys.new_empty(shape, dtype=torch.int64)
    return keys.new_empty(shape), slots, keys.new_empty(sub_shape), slots.new_empty(sub_shape)


def _backward_cpu(
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
    shared = keys.shape[0] == 1
    n = keys.shape[3]
    rows, flat_keys = by_codebook(query.to(keys.dtype), shared), keys.flatten(0, 2)

    def coefficients(grad: Tensor) -> Tensor:
        if score == "idw":  # ds_i/dq = -ds_i/dK_i = -2 (q - K_i) / (eps + d_i), and 1 / (eps + d_i) = exp(s_i)
            grad = grad * sub_scores.exp() * -2
        return selected_by_codebook(grad, shared)

    of_scores = selected_gradient(grad_scores, slots, sub_slots, n)
    of_keys = coefficients(of_scores + grad_sub_scores)
    of_rows = of_keys if sub_scores_reach_query else coefficients(of_scores)
    selected = Selected.of(of_keys, selected_by_codebook(sub_slots, shared), n)
    grad_rows = selected._replace(coefficients=of_rows).times(flat_keys)
    grad_keys = selected.transposed_times(rows)
    if score == "idw":
        grad_rows = of_rows.sum(-1, keepdim=True) * rows - grad_rows
        grad_keys = selected.sums().unsqueeze(-1) * flat_keys - grad_keys
    pattern = "(h c) (m p) d -> m p h (c d)" if shared else "(m h c) p d -> m p h (c d)"
    memories, tokens, heads, _ = query.shape
    grad_query = rearrange(grad_rows.to(query.dtype), pattern, m=memories, p=tokens, h=heads, c=2).contiguous()
    return grad_query, grad_keys.view(keys.shape)


def _backward_fake(
    grad_scores: Tensor,
    grad_sub_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    slots: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    score: str,
    sub_scores_reach_query: bool,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, keys, _, ctx.score, _, ctx.sub_scores_reach_query = inputs
    _, slots, sub_scores, sub_slots = output
    ctx.mark_non_differentiable(slots, sub_slots)
    ctx.save_for_backward(query, keys, slots, sub_scores, sub_slots)


def _backward(ctx: Any, grad_scores: Tensor, _slots: Tensor, grad_sub_scores: Tensor, _sub_slots: Tensor) -> Any:
    options = ctx.score, ctx.sub_scores_reach_query
    grad_query, grad_keys = _backward_operator(grad_scores, grad_sub_scores, *ctx.saved_tensors, *options)
    return grad_query, grad_keys, None, None, None, None


def fold_query_and_keys(info: Any, in_dims: Any, args: Any) -> tuple[list[Any], tuple[int, int]]:
    """:func:`fold` of ``query``, ``keys`` and what follows; keys that all samples share stay those of one memory."""
    keys = args[1]
    shared = in_dims[1] is None and keys.shape[0] == 1
    (query, own_keys, *others), sizes = fold(info, in_dims, (args[0], None if shared else keys, *args[2:]))
    return [query, keys if shared else own_keys, *others], sizes


def own_keys_gradient(info: Any, in_dim: int | None, keys: Tensor, grad_keys: Tensor) -> Tensor:
    """Gradients ``[B, M, ...]`` as those of each sample's ``keys``, which its memories may share: ``[B, 1, ...]``."""
    (keys,) = batch_first(info, (in_dim,), (keys,))
    return grad_keys.sum_to_size(keys.shape)


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    folded, sizes = fold_query_and_keys(info, in_dims, args)
    return tuple(x.unflatten(0, sizes) for x in _operator(*folded)), 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    folded, sizes = fold(info, in_dims, args)
    grad_query, grad_keys = (x.unflatten(0, sizes) for x in _backward_operator(*folded))
    return (grad_query, own_keys_gradient(info, in_dims[3], args[3], grad_keys)), 0


def _flops(query: Sequence[int], keys: Sequence[int], **_: Any) -> int:
    """Every query with every sub-key of its codebooks."""
    return 2 * prod(query) * keys[3]


def _backward_flops(query: Sequence[int], sub_slots: Sequence[int], **_: Any) -> int:
    """The coefficients of the selected sub-keys, times the sub-keys and times the queries."""
    return 4 * prod(query) * sub_slots[-1]


_operator = register(
    "product_key_address(Tensor query, Tensor keys, int k, str score, float eps, bool sub_scores_reach_query)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _cpu,
    "fwpkm.ops.cuda.product_key_address:forward",
    _fake,
    _flops,
    _check,
)
_backward_operator = register(
    "product_key_address_backward(Tensor grad_scores, Tensor grad_sub_scores, Tensor query, Tensor keys, Tensor slots,"
    " Tensor sub_scores, Tensor sub_slots, str score, bool sub_scores_reach_query) -> (Tensor, Tensor)",
    _backward_cpu,
    "fwpkm.ops.cuda.product_key_address:backward",
    _backward_fake,
    _backward_flops,
)
register_backward(_operator, _backward, _setup_context, _vmap)
refuse_double_backward(_backward_operator, _backward_vmap)
