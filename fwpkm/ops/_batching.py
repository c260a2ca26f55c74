"""What the batching rules of the operators share: a batch of ``B`` samples becomes more rows of a single call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def batch_first(info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> list[Any]:
    """Tensors as ``[B, ...]``: the batch dimension moved there, or made where there is none; other arguments as is."""

    def move(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    return [move(x, dim) if isinstance(x, Tensor) else x for x, dim in zip(args, in_dims, strict=True)]


def fold(info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[list[Any], tuple[int, int]]:
    """Tensors ``[M, ...]``, or ``[1, ...]`` when the ``M`` memories share them, of all samples: ``[B * M, ...]``.

    ``M`` is what the first argument has. Other arguments are left as they are. Returns ``(B, M)`` too.
    """
    batched = batch_first(info, in_dims, args)
    memories = batched[0].shape[1]
    folded = [x.expand(-1, memories, *x.shape[2:]).flatten(0, 1) if isinstance(x, Tensor) else x for x in batched]
    return folded, (info.batch_size, memories)


def in_own_table(slots: Tensor, n_slots: int) -> Tensor:
    """Slots ``[B, ...]`` of samples with ``n_slots`` rows each, as rows of all their tables, ``[B * n_slots, ...]``.

    A slot out of range stays out of range: it must not land in another sample's table.
    """
    first = torch.arange(slots.shape[0], device=slots.device) * n_slots
    rows = slots + first.view(-1, *(1,) * (slots.dim() - 1))
    return torch.where((slots >= 0) & (slots < n_slots), rows, -1)
