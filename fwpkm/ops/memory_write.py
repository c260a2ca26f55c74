"""Write (DESIGN 2.6): add residuals to the addressed rows of the values, in place."""

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
    require_shape,
    require_slots,
)
from fwpkm.ops._batching import batch_first, in_own_table
from fwpkm.ops._library import refuse_gradients, register
from fwpkm.ops._rows import add_to_rows_, segment, token_of_entry


def memory_write_(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> Tensor:
    """``values[slots[p, j]] += coefficients[p, j] * residuals[p]``, in place and outside autograd.

    Only the addressed rows are touched; they are never copied, and their sums are taken in a fixed order.

    Args:
        values: ``[N, Dv]``, contiguous, float32 (float64 for numerical checks); must not require a gradient.
        slots: ``[P, K]`` int64 in ``[0, N)``.
        coefficients: ``[P, K]``, dtype of ``values``.
        residuals: ``[P, Dv]``, dtype of ``values``, bfloat16 or float16. Half precision is converted when it is loaded.

    Under ``torch.func.vmap`` each sample has values of its own, all of them contiguous: ``[B, N, Dv]``.

    Returns:
        ``values``.

    Raises:
        ValueError: for a wrong shape, dtype or layout, a slot out of range, ``values`` that require a gradient, or
            that samples of a vmap share.
        RuntimeError: under ``torch.func.grad`` and its kin.
    """
    require_shape("values", values, ("N", "Dv"))
    require_fast_weight_dtype("values", values)
    require(values.is_contiguous(), "values.stride()", values.stride(), "contiguous values")
    require(not values.requires_grad, "values.requires_grad", True, "False: a write is outside autograd")
    require_shape("slots", slots, ("P", "K"))
    require_dtype("slots", slots, torch.int64)
    require_shape("coefficients", coefficients, slots.shape)
    require_dtype("coefficients", coefficients, values.dtype)
    require_shape("residuals", residuals, (slots.shape[0], values.shape[1]))
    require_input_dtype("residuals", residuals, values.dtype)
    with torch.no_grad():
        _operator(values, slots, coefficients, residuals)
    return values


def _check(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> None:
    require_slots("slots", slots, values.shape[0])


def _cpu(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> None:
    _check(values, slots, coefficients, residuals)
    wide = residuals.to(values.dtype).contiguous()
    add_to_rows_(values, segment(slots.reshape(-1), token_of_entry(slots)), coefficients, wide)


def _fake(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> None:
    return None


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    require(in_dims[0] is not None, "values", "the same for all of vmap", "values of its own for each sample")
    values, slots, coefficients, residuals = batch_first(info, in_dims, args)
    require(values.is_contiguous(), "values.stride()", values.stride(), "the samples' values contiguous, [B, N, Dv]")
    slots = in_own_table(slots, values.shape[1])
    _operator(values.flatten(0, 1), *(x.flatten(0, 1) for x in (slots, coefficients, residuals)))
    return None, None


def _flops(slots: Sequence[int], residuals: Sequence[int], **_: Any) -> int:
    return 2 * prod(slots) * residuals[1]


_operator = register(
    "memory_write_(Tensor(a!) values, Tensor slots, Tensor coefficients, Tensor residuals) -> ()",
    _cpu,
    "fwpkm.ops.cuda.memory_write:forward",
    _fake,
    _flops,
    _check,
)
refuse_gradients(_operator, _vmap)
