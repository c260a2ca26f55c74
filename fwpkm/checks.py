"""Argument checks: every complaint names the argument, its value and what is expected."""

from collections.abc import Sequence

import torch
from torch import Tensor


def require(condition: bool, argument: str, value: object, expected: str) -> None:
    """Raise ``ValueError("<argument> is <value>; expected <expected>")`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{argument} is {value}; expected {expected}")


def require_shape(argument: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Check a tensor's shape; a string in ``shape`` names a dimension of any size."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=False)
    )
    names = ", ".join(str(size) for size in shape)
    require(fits, f"{argument}.shape", list(tensor.shape), f"[{names}]")


def require_dtype(argument: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Check that a tensor has one of ``dtypes``."""
    require(tensor.dtype in dtypes, f"{argument}.dtype", tensor.dtype, " or ".join(str(d) for d in dtypes))


def require_fast_weight_dtype(argument: str, tensor: Tensor) -> None:
    """Fast weights and what acts on them are float32; float64 serves numerical checks."""
    require_dtype(argument, tensor, torch.float32, torch.float64)


def require_slots(argument: str, slots: Tensor, n_slots: int) -> None:
    """Check on the CPU that every slot lies in ``[0, n_slots)``; never called where it would wait for a GPU."""
    if slots.numel():
        low, high = (int(bound) for bound in slots.aminmax())
        require(0 <= low and high < n_slots, argument, f"in [{low}, {high}]", f"slots in [0, {n_slots})")
