"""Write (DESIGN 2.6): add residuals to the addressed rows of the values, in place."""

import torch
from torch import Tensor

from fwpkm.checks import require, require_dtype, require_fast_weight_dtype, require_shape, require_slots
from fwpkm.ops._library import register
from fwpkm.ops._rows import add_to_rows_, segment, token_of_entry


def memory_write_(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> Tensor:
    """``values[slots[p, j]] += coefficients[p, j] * residuals[p]``, in place and outside autograd.

    Only the addressed rows are touched; they are never copied, and their sums are taken in a fixed order.

    Args:
        values: ``[N, Dv]``, contiguous, float32 (float64 for numerical checks); must not require a gradient.
        slots: ``[P, K]`` int64 in ``[0, N)``.
        coefficients: ``[P, K]``, dtype of ``values``.
        residuals: ``[P, Dv]``, dtype of ``values``.

    Returns:
        ``values``.

    Raises:
        ValueError: for a wrong shape, dtype or layout, a slot out of range, or ``values`` that require a gradient.
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
    require_dtype("residuals", residuals, values.dtype)
    with torch.no_grad():
        _operator(values, slots, coefficients, residuals)
    return values


def _cpu(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> None:
    require_slots("slots", slots, values.shape[0])
    add_to_rows_(values, segment(slots.reshape(-1), token_of_entry(slots)), coefficients, residuals.contiguous())


def _fake(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> None:
    return None


_operator = register(
    "memory_write_(Tensor(a!) values, Tensor slots, Tensor coefficients, Tensor residuals) -> ()", _cpu, _fake
)
