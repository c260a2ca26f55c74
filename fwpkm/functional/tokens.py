"""What goes into a memory and what comes out, in the order in which the memory sees its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.memory.state import MemoryState


class Tokens(NamedTuple):
    """Tokens of ``M`` memories, ``[M, P, ...]``."""

    query: Tensor  # [M, P, H, Dk], dtype of the fast weights or half precision
    target: Tensor  # [M, P, Dv]
    gate: Tensor  # [M, P]
    mask: Tensor | None  # [M, P]

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """``change`` of each."""
        mask = None if self.mask is None else change(self.mask)
        return Tokens(change(self.query), change(self.target), change(self.gate), mask)

    def part(self, start: int, stop: int) -> Tokens:
        """Those from ``start`` to ``stop``."""
        query, target, gate = (x[:, start:stop] for x in self[:3])
        return Tokens(query, target, gate, None if self.mask is None else self.mask[:, start:stop])


class Read(NamedTuple):
    """What tokens read."""

    output: Tensor  # [M, P, Dv]
    slots: Tensor  # [M, P, K]
    weights: Tensor  # [M, P, K]


@dataclass(frozen=True)
class ChunkLosses:
    """Addressing losses of committed chunks: their sum, and how many."""

    total: Tensor
    count: Tensor

    @classmethod
    def none(cls, like: Tensor) -> ChunkLosses:
        """Of no chunk."""
        return cls(like.new_zeros(()), like.new_zeros(()))

    @classmethod
    def of(cls, losses: Tensor, exists: Tensor | None = None) -> ChunkLosses:
        """Of one chunk for each element of ``losses``, where it ``exists``."""
        if exists is None:
            return cls(losses.sum(), losses.new_full((), losses.numel()))
        return cls(torch.where(exists, losses, 0.0).sum(), exists.sum().to(losses.dtype))

    def __add__(self, other: ChunkLosses) -> ChunkLosses:
        return ChunkLosses(self.total + other.total, self.count + other.count)

    def mean(self) -> Tensor:
        """0 if there is none."""
        return self.total / self.count.clamp_min(1)


def check_kept_queries(state: MemoryState, moving: bool, training: bool) -> None:
    """A chunk whose keys commit at its end needs the queries of all its tokens."""
    kept = state.open is not None and len(state.open.tensors) == 3
    require(
        not state.has_open or kept == moving,
        "training",
        training,
        "the same for all tokens of a chunk when key_update is 'train_only' (flush() the state in between)",
    )
