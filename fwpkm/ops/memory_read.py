"""Read (DESIGN 2.4): the weighted sum of the addressed rows of the values."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fwpkm.checks import (
    require,
    require_dtype,
    require_fast_weight_dtype,
    require_input_dtype,
    require_no_nan,
    require_shape,
    require_slots,
)
from fwpkm.ops._batching import batch_first, in_own_table
from fwpkm.ops._library import refuse_double_backward, register, register_backward
from fwpkm.ops._rows import add_to_rows_, row_products, segment, token_of_entry, weighted_sum


def memory_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """``out = sum_j weights[..., j] * values[slots[..., j]]`` (paper, equation 6).

    Args:
        values: ``[N, Dv]``, float32 (float64 for numerical checks).
        slots: ``[..., K]`` int64 in ``[0, N)``.
        weights: ``[..., K]``, dtype of ``values``, bfloat16 or float16. Half precision is converted when it is loaded.

    Returns:
        ``[..., Dv]`` in the dtype of ``weights``; the sum is taken in that of ``values`` and rounded once. Gradients
        flow to ``weights``, in their dtype, and, as a dense ``[N, Dv]`` tensor in theirs, to ``values`` when they
        require one. Its backward needs ``values`` as they were read: writing them in between is an error that autograd
        reports (:func:`memory_scan` keeps the rows it read instead).

    Raises:
        ValueError: for a wrong shape or dtype, or a slot out of range.
    """
    require_shape("values", values, ("N", "Dv"))
    require_fast_weight_dtype("values", values)
    require_dtype("slots", slots, torch.int64)
    require_input_dtype("weights", weights, values.dtype)
    require(slots.dim() > 0, "slots.shape", slots.shape, "[..., K]")
    require_shape("weights", weights, slots.shape)
    return _operator(values, slots, weights)


def _check(values: Tensor, slots: Tensor, weights: Tensor) -> None:
    require_slots("slots", slots, values.shape[0])
    require_no_nan("weights", weights)


def _cpu(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    _check(values, slots, weights)
    fanout = slots.shape[-1]
    wide = weights.to(values.dtype).reshape(-1, fanout)
    out = weighted_sum(values.contiguous(), slots.reshape(-1, fanout), wide).to(weights.dtype)
    return out.view(*slots.shape[:-1], values.shape[1])


def _fake(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty((*slots.shape[:-1], values.shape[1]))


def _backward_cpu(
    grad: Tensor, values: Tensor, slots: Tensor, weights: Tensor, values_need_grad: bool
) -> tuple[Tensor, Tensor]:
    vectors, index = grad.to(values.dtype).reshape(-1, values.shape[1]).contiguous(), slots.reshape(-1, slots.shape[-1])
    tokens = token_of_entry(index)
    grad_weights = row_products(values.contiguous(), index.reshape(-1), vectors, tokens).view(slots.shape)
    grad_values = values.new_zeros(values.shape if values_need_grad else 0)
    if values_need_grad:
        add_to_rows_(grad_values, segment(index.reshape(-1), tokens), weights.to(values.dtype), vectors)
    return grad_values, grad_weights.to(weights.dtype)


def _backward_fake(
    grad: Tensor, values: Tensor, slots: Tensor, weights: Tensor, values_need_grad: bool
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape if values_need_grad else 0), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Any:
    values_need_grad = ctx.needs_input_grad[0]
    grad_values, grad_weights = _backward_operator(grad, *ctx.saved_tensors, values_need_grad)
    return grad_values if values_need_grad else None, None, grad_weights


def _vmap(info: Any, in_dims: Any, values: Tensor, slots: Tensor, weights: Tensor) -> Any:
    own_values, slots, weights = batch_first(info, in_dims, (values, slots, weights))
    if in_dims[0] is not None:
        values, slots = own_values.flatten(0, 1), in_own_table(slots, own_values.shape[1])
    return _operator(values, slots, weights), 0


def _backward_vmap(
    info: Any, in_dims: Any, grad: Tensor, values: Tensor, slots: Tensor, weights: Tensor, values_need_grad: bool
) -> Any:
    grad, own_values, slots, weights = batch_first(info, in_dims[:4], (grad, values, slots, weights))
    if in_dims[1] is not None or values_need_grad:  # a sample's gradient is its own even where the values are not
        values, slots = own_values.flatten(0, 1), in_own_table(slots, own_values.shape[1])
    grad_values, grad_weights = _backward_operator(grad, values, slots, weights, values_need_grad)
    if not values_need_grad:
        return (grad_values, grad_weights), (None, 0)
    return (grad_values.view(own_values.shape), grad_weights), 0


def _flops(values: Sequence[int], slots: Sequence[int], **_: Any) -> int:
    return 2 * prod(slots) * values[1]


def _backward_flops(values: Sequence[int], slots: Sequence[int], values_need_grad: bool, **_: Any) -> int:
    """Gradients of the weights and, where needed, of the values."""
    return (4 if values_need_grad else 2) * prod(slots) * values[1]


_operator = register(
    "memory_read(Tensor values, Tensor slots, Tensor weights) -> Tensor",
    _cpu,
    "fwpkm.ops.cuda.memory_read:forward",
    _fake,
    _flops,
    _check,
)
_backward_operator = register(
    "memory_read_backward(Tensor grad, Tensor values, Tensor slots, Tensor weights, bool values_need_grad)"
    " -> (Tensor, Tensor)",
    _backward_cpu,
    "fwpkm.ops.cuda.memory_read:backward",
    _backward_fake,
    _backward_flops,
)
register_backward(_operator, _backward, _setup_context, _vmap)
refuse_double_backward(_backward_operator, _backward_vmap)
