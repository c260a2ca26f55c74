"""Computing in the dtypes given."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off on the device of ``x``; meta, which knows none, is left alone."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # torch 2.11 does not trace is_autocast_available
        return torch.autocast(kind, enabled=False)
    return nullcontext()
