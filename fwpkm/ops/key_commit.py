"""Key commit (DESIGN 2.7): one gradient step of the sub-keys on the addressing loss of a chunk."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fwpkm.checks import require_dtype, require_shape
from fwpkm.ops._batching import fold
from fwpkm.ops._library import refuse_double_backward, register, register_backward
from fwpkm.ops._selected import Selected
from fwpkm.ops.product_key_address import (
    by_codebook,
    check_query_and_keys,
    fold_query_and_keys,
    own_keys_gradient,
    selected_by_codebook,
)

ENTROPY_EPS = 1e-8


def key_commit(
    query: Tensor,
    keys: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    mask: Tensor | None,
    rate: float,
    score: str = "idw",
) -> Tensor:
    """``K - rate * dL_addr/dK`` for ``M`` memories, the addressing loss taken over the ``P`` tokens of a chunk.

    ``L_addr = -H(p1) - H(p2)``, where ``p1``, ``p2 [n]`` are the mean over tokens and heads of the softmax over each
    codebook's selected sub-scores: the step spreads the reads over the sub-keys.

    Args:
        query: ``[M, P, H, Dk]``, the chunk's queries, in the dtype of ``keys``, bfloat16 or float16; as in
            :func:`product_key_address` half precision is converted when it is loaded, and its gradient rounded once.
        keys: ``[M, H, 2, n, Dk/2]``, or ``[1, ...]`` when the memories start from the same sub-keys.
        sub_scores, sub_slots: ``[M, P, H, 2, k]`` as :func:`product_key_address` returned them for these ``keys``;
            sub-scores in their dtype.
        mask: ``[M, P]`` bool, True for tokens that count; None for all of them.
        rate: learning rate times weight of the loss.
        score: as in :func:`product_key_address`. Its ``eps`` is not needed: ``1 / (eps + d)`` is ``exp(sub_score)``.

    Returns:
        New sub-keys ``[M, H, 2, n, Dk/2]``. Differentiable, second order included; gradients flow to ``query``,
        ``keys`` and ``sub_scores`` (and through those on to the queries and keys they came from).

    Raises:
        ValueError: for a wrong shape, dtype or ``score``.
    """
    check_query_and_keys(query, keys, score)
    memories, tokens, heads, _ = query.shape
    require_shape("sub_scores", sub_scores, (memories, tokens, heads, 2, "k"))
    require_shape("sub_slots", sub_slots, sub_scores.shape)
    require_dtype("sub_scores", sub_scores, keys.dtype)
    require_dtype("sub_slots", sub_slots, torch.int64)
    if mask is not None:
        require_shape("mask", mask, (memories, tokens))
        require_dtype("mask", mask, torch.bool)
    return _operator(query, keys, sub_scores, sub_slots, mask, rate, score)


def mean_usage(probabilities: Tensor, sub_slots: Tensor, pairs: Tensor, n: int) -> Tensor:
    """``p-bar [M, 2, n]``: how often each sub-key is used, a mean over the chunk's tokens and heads."""
    usage = probabilities.new_zeros(probabilities.shape[0], 2, n)
    flat = [rearrange(x, "m p h c k -> m c (p h k)") for x in (sub_slots, probabilities)]
    return usage.scatter_add_(-1, *flat) / pairs.view(-1, 1, 1)


class _Loss(NamedTuple):
    """Closed form of ``dL_addr/ds`` (DESIGN 2.7) for the selected sub-scores ``[M, P, H, 2, k]``."""

    pairs: Tensor  # [M] (token, head) pairs that count
    probabilities: Tensor  # p, zero for tokens that do not count
    usage: Tensor  # p-bar [M, 2, n]
    pull: Tensor  # u at the selected sub-keys
    gradient: Tensor  # dL/ds = p (u - sum p u)


def _addressing_loss(sub_scores: Tensor, sub_slots: Tensor, mask: Tensor | None, n: int) -> _Loss:
    memories, tokens, heads = sub_scores.shape[:3]
    probabilities = sub_scores.softmax(-1)
    if mask is None:
        pairs = probabilities.new_full((memories,), tokens * heads)
    else:
        probabilities = torch.where(mask[:, :, None, None, None], probabilities, 0.0)
        pairs = mask.sum(1).to(probabilities.dtype) * heads
    pairs = pairs.clamp_min(1)  # no token: no usage, no step
    usage = mean_usage(probabilities, sub_slots, pairs, n)
    u = ((usage + ENTROPY_EPS).log() + usage / (usage + ENTROPY_EPS)) / pairs.view(-1, 1, 1)
    pull = _at(u, sub_slots)
    gradient = probabilities * (pull - (probabilities * pull).sum(-1, keepdim=True))
    return _Loss(pairs, probabilities, usage, pull, gradient)


def _at(per_subkey: Tensor, sub_slots: Tensor) -> Tensor:
    """Look up ``[M, 2, n]`` at ``sub_slots [M, P, H, 2, k]``."""
    _, tokens, heads, _, topk = sub_slots.shape
    found = per_subkey.gather(-1, rearrange(sub_slots, "m p h c k -> m c (p h k)"))
    return rearrange(found, "m c (p h k) -> m p h c k", p=tokens, h=heads, k=topk)


def _coefficients(gradient: Tensor, sub_scores: Tensor, score: str) -> Tensor:
    """``c`` with ``dL/dK = c^T q - diag(sum_t c) K`` (``idw``) or ``c^T q`` (``dot``)."""
    return gradient * sub_scores.exp() * 2 if score == "idw" else gradient


def _selected(coefficients: Tensor, sub_slots: Tensor, n: int) -> Selected:
    """Coefficients of the selected sub-keys, ``[M, P, H, 2, k]``, as a matrix for each of ``M * H * 2`` codebooks."""
    return Selected.of(selected_by_codebook(coefficients, False), selected_by_codebook(sub_slots, False), n)


def _cpu(
    query: Tensor, keys: Tensor, sub_scores: Tensor, sub_slots: Tensor, mask: Tensor | None, rate: float, score: str
) -> Tensor:
    memories, n = query.shape[0], keys.shape[3]
    start = keys.expand(memories, *keys.shape[1:])
    if mask is not None and not mask.any():
        return start.clone(memory_format=torch.contiguous_format)
    loss = _addressing_loss(sub_scores, sub_slots, mask, n)
    selected = _selected(_coefficients(loss.gradient, sub_scores, score), sub_slots, n)
    step = selected.transposed_times(by_codebook(query.to(keys.dtype), False)).view(start.shape)
    if score == "idw":
        step -= selected.sums().view(*start.shape[:-1], 1) * start
    return start - rate * step


def _fake(
    query: Tensor, keys: Tensor, sub_scores: Tensor, sub_slots: Tensor, mask: Tensor | None, rate: float, score: str
) -> Tensor:
    return keys.new_empty((query.shape[0], *keys.shape[1:]))


def _backward_cpu(
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
    n = keys.shape[3]
    if not grad.any():  # nobody reads what the last chunk commits
        return query.new_zeros(query.shape), keys.new_zeros(keys.shape), sub_scores.new_zeros(sub_scores.shape)
    start = keys.expand(memories, *keys.shape[1:])
    loss = _addressing_loss(sub_scores, sub_slots, mask, n)
    selected = _selected(_coefficients(loss.gradient, sub_scores, score), sub_slots, n)
    flat_grad = grad.flatten(0, 2)  # [M * H * 2, n, d]

    sizes = {"m": memories, "h": heads, "c": 2}
    grad_query = rearrange(selected.times(flat_grad), "(m h c) p d -> m p h (c d)", **sizes) * -rate
    grad_query = grad_query.to(query.dtype)
    grad_keys = grad
    grad_selected = selected.products(by_codebook(query.to(keys.dtype), False), flat_grad)  # <q_t, G_i>
    if score == "idw":
        grad_keys = grad + rate * selected.sums().view(*grad.shape[:-1], 1) * grad
        own = (start * grad).sum(-1).flatten()  # <K_i, G_i>
        grad_selected -= own[selected.entries].view(grad_selected.shape)
    if keys.shape[0] == 1:
        grad_keys = grad_keys.sum(0, keepdim=True)
    grad_coefficients = rearrange(grad_selected, "(m h c) p k -> m p h c k", **sizes) * -rate

    # From the coefficients back through dL/ds = p (u - sum p u) to the sub-scores.
    if score == "idw":
        scale = sub_scores.exp() * 2
        grad_gradient, grad_direct = grad_coefficients * scale, grad_coefficients * loss.gradient * scale
    else:
        grad_gradient, grad_direct = grad_coefficients, torch.zeros_like(grad_coefficients)
    probabilities, pull = loss.probabilities, loss.pull
    inner = (grad_gradient * probabilities).sum(-1, keepdim=True)
    grad_probabilities = grad_gradient * (pull - (probabilities * pull).sum(-1, keepdim=True)) - inner * pull
    # u = f(p-bar) / pairs with f'(x) = 1 / (x + e) + e / (x + e)^2, and p-bar = sum p / pairs.
    pairs = loss.pairs.view(-1, 1, 1)
    grad_u = mean_usage(probabilities * (grad_gradient - inner), sub_slots, loss.pairs, n)  # already over pairs
    shifted = loss.usage + ENTROPY_EPS
    grad_usage = grad_u * (1 / shifted + ENTROPY_EPS / shifted.square()) / pairs
    grad_probabilities = grad_probabilities + _at(grad_usage, sub_slots)
    # softmax; masked tokens have p = 0 and so no gradient
    grad_scores = probabilities * (grad_probabilities - (probabilities * grad_probabilities).sum(-1, keepdim=True))
    return grad_query.contiguous(), grad_keys.clone(), (grad_scores + grad_direct).contiguous()


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    mask: Tensor | None,
    rate: float,
    score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), sub_scores.new_empty(sub_scores.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.rate, ctx.score = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    grad_query, grad_keys, grad_sub_scores = _backward_operator(grad, *ctx.saved_tensors, ctx.rate, ctx.score)
    return grad_query, grad_keys, grad_sub_scores, None, None, None, None


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    folded, sizes = fold_query_and_keys(info, in_dims, args)
    return _operator(*folded).unflatten(0, sizes), 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    folded, sizes = fold(info, in_dims, args)
    grad_query, grad_keys, grad_sub_scores = (x.unflatten(0, sizes) for x in _backward_operator(*folded))
    return (grad_query, own_keys_gradient(info, in_dims[2], args[2], grad_keys), grad_sub_scores), 0


def _flops(query: Sequence[int], sub_slots: Sequence[int], **_: Any) -> int:
    """Every query times its coefficient, for each of the sub-keys that it selected."""
    return 2 * prod(query) * sub_slots[-1]


def _backward_flops(query: Sequence[int], sub_slots: Sequence[int], **_: Any) -> int:
    """The coefficients and the queries, each times the gradient of what was selected."""
    return 4 * prod(query) * sub_slots[-1]


_operator = register(
    "key_commit(Tensor query, Tensor keys, Tensor sub_scores, Tensor sub_slots, Tensor? mask, float rate, str score)"
    " -> Tensor",
    _cpu,
    "fwpkm.ops.cuda.key_commit:forward",
    _fake,
    _flops,
)
_backward_operator = register(
    "key_commit_backward(Tensor grad, Tensor query, Tensor keys, Tensor sub_scores, Tensor sub_slots, Tensor? mask,"
    " float rate, str score) -> (Tensor, Tensor, Tensor)",
    _backward_cpu,
    "fwpkm.ops.cuda.key_commit:backward",
    _backward_fake,
    _backward_flops,
)
register_backward(_operator, _backward, _setup_context, _vmap)
refuse_double_backward(_backward_operator, _backward_vmap)
