"""Argument checks: every complaint names the argument, its value and what is expected."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def require(condition: bool, argument: str, value: object, expected: str, *details: object) -> None:
    """Raise ``ValueError("<argument> is <value>; expected <expected>")`` unless ``condition``.

    ``details`` fill the ``{}`` of ``expected``, and only then: sizes stay symbolic while a graph is traced.
    """
    if not condition:
        raise ValueError(f"{argument} is {value}; expected {expected.format(*details)}")


def require_integer(argument: str, value: object, low: int) -> None:
    """Check that a value is a whole number, which a flag is not, of at least ``low`` and of at most 64 bits."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and low <= value < 1 << 63):  # type: ignore[operator]
        require(False, argument, repr(value), "an integer >= {}", low)  # graphs for any sizes do not trace repr


def require_number(argument: str, value: object, low: float = -math.inf, *, open: bool = False) -> None:
    """Check that a value is a finite number, which a flag is not, of at least ``low``, or above it if that is open."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # graphs for any sizes do not trace math.isfinite
    number = number and abs(value) < math.inf and (value > low if open else value >= low)  # type: ignore[operator, arg-type]
    if not number:
        bound = f" {'>' if open else '>='} {low}" if math.isfinite(low) else ""
        require(False, argument, repr(value), "a number{}, and finite", bound)


def require_shape(argument: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Check a tensor's shape; a string in ``shape`` names a dimension of any size."""
    sizes = tensor.shape
    if len(sizes) == len(shape):
        for have, want in zip(sizes, shape, strict=True):
            if not isinstance(want, str) and have != want:
                break
        else:
            return
    raise ValueError(f"{argument}.shape is {list(sizes)}; expected [{', '.join(map(str, shape))}]")


def require_dtype(argument: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Check that a tensor has one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{argument}.dtype is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")


def require_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Check that a string is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{argument} is {value!r}; expected {' or '.join(map(repr, choices))}")


def require_fast_weight_dtype(argument: str, tensor: Tensor) -> None:
    """Fast weights and what acts on them are float32; float64 serves numerical checks."""
    require_dtype(argument, tensor, torch.float32, torch.float64)


def require_input_dtype(argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """What comes in has the ``dtype`` of the fast weights, or half precision, and is converted where it is loaded."""
    require_dtype(argument, tensor, dtype, torch.bfloat16, torch.float16)


def require_slots(argument: str, slots: Tensor, n_slots: int) -> None:
    """Check on the CPU that every slot lies in ``[0, n_slots)``; never called where it would wait for a GPU."""
    if slots.numel():
        low, high = (int(bound) for bound in slots.aminmax())
        require(low >= 0 and high < n_slots, argument, f"in [{low}, {high}]", "slots in [0, {})", n_slots)


def require_no_nan(argument: str, tensor: Tensor) -> None:
    """Refuse NaN, on the CPU; never called where it would wait for a GPU."""
    if not torch.isfinite(tensor.sum()) and bool(tensor.isnan().any()):
        raise ValueError(f"{argument} holds NaN; expected numbers")


def require_finite(argument: str, tensor: Tensor) -> None:
    """Refuse NaN and infinities, where a checkpoint is loaded; never called where it would wait for a GPU."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{argument} holds NaN or infinities; expected finite numbers")
