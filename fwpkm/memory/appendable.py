"""Tensors that grow along a dimension, at a cost that is amortised: what a memory state remembers of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def surely(condition: bool) -> bool:
    """Whether a condition on sizes holds, as far as a graph that is made for many sizes can know; it is not guarded."""
    return statically_known_true(condition)


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` is what a transform of ``torch.func`` has made of a tensor."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_batched(x: Tensor) -> bool:
    """Whether ``torch.func.vmap`` has made ``x`` of a tensor with a dimension more."""
    while is_transformed(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def normal(x: Tensor) -> Tensor:
    """``x``, or outside inference mode a copy of what was computed in it, which could not be recorded or changed."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


@dataclass(frozen=True)
class Appendable:
    """Tensors ``[M, capacity, ...]`` of which the first ``used`` columns are in use; immutable, like what holds it.

    Appending writes into the free columns, which nobody else can see, if this is the furthest of all that share them;
    otherwise, and when they are full or a gradient is recorded, it copies. So a long chain of appends copies each
    column a constant number of times on average, and continuing one state twice gives independent results.
    """

    tensors: tuple[Tensor, ...]
    used: int
    tip: list[int] = field(repr=False)  # shared by all that share the tensors: how far these are written

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Appendable:
        """All columns of ``tensors``, which the caller must not write to any more."""
        used = tensors[0].shape[1]
        return cls(tuple(tensors), used, [used])

    def columns(self) -> list[Tensor]:
        """The columns in use, ``[M, used, ...]``."""
        return [x[:, : self.used] for x in self.tensors]

    def drop(self, columns: int) -> Appendable:
        """All but the last ``columns``."""
        return Appendable(self.tensors, self.used - columns, self.tip)

    def select(self, index: Tensor) -> Appendable:
        """The rows ``index``, a copy."""
        return Appendable.of([x[index] for x in self.columns()])

    def map(self, change: Callable[[Tensor], Tensor]) -> Appendable:
        """The same with ``change`` of each tensor, which leaves what it holds as it is."""
        return Appendable(tuple(map(change, self.tensors)), self.used, self.tip)

    def __deepcopy__(self, memo: dict[int, Any]) -> Appendable:
        """Itself: nobody changes it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the columns in use, and none of what others wrote behind them."""
        return Appendable.of, ([x.clone() for x in self.columns()],)

    def unshared(self) -> Appendable:
        """The same, to be copied before it is written to."""
        return Appendable(self.tensors, self.used, [-1])

    def append(self, new: Sequence[Tensor], keep: int | None = None) -> Appendable:
        """Add columns ``[M, T, ...]``. All but the last ``keep`` of the old ones are dropped whenever that is cheap."""
        kept = self if keep is None or self.used <= keep else Appendable(self.last(keep), keep, [-1])
        if self._functional(new):
            return Appendable.of([torch.cat(pair, 1) for pair in zip(kept.columns(), new, strict=True)])
        width = new[0].shape[1]
        grown = self._with_room(width) if self._has_room(width) else kept._with_room(width)
        for old, columns in zip(grown.tensors, new, strict=True):
            old.data[:, grown.used - width : grown.used] = columns
        return grown

    def last(self, width: int) -> tuple[Tensor, ...]:
        """The last columns ``[M, width, ...]``."""
        return tuple(x[:, self.used - width : self.used] for x in self.tensors)

    def insert(self, new: Sequence[Tensor], at: Tensor) -> Appendable:
        """Write columns ``[M, T, ...]`` in row ``m`` from column ``at[m] <= used`` on, over what stands there.

        Columns of a row past the end that the caller counts for it may hold anything.
        """
        memories, width = new[0].shape[:2]
        rows = torch.arange(memories, device=at.device).unsqueeze(1)
        index = rows, at.unsqueeze(1) + torch.arange(width, device=at.device)
        if self._functional(new):
            longer = [torch.cat((x, torch.zeros_like(y)), 1) for x, y in zip(self.columns(), new, strict=True)]
            return Appendable.of([x.index_put(index, y) for x, y in zip(longer, new, strict=True)])
        grown = self._with_room(width)
        for old, columns in zip(grown.tensors, new, strict=True):
            old.data.index_put_(index, columns)
        return grown

    def _functional(self, new: Sequence[Tensor]) -> bool:
        """Whether nothing may be written in place: a gradient is recorded, or ``torch.func`` transforms."""
        tensors = (*self.tensors, *new)
        return any((torch.is_grad_enabled() and x.requires_grad) or is_transformed(x) for x in tensors)

    def _has_room(self, width: int) -> bool:
        """Whether that many columns are free, and nobody else sees them."""
        return self.tip[0] == self.used and self.used + width <= self.tensors[0].shape[1]

    def _with_room(self, width: int) -> Appendable:
        """These with ``width`` more columns in use, which the caller may write to.

        It writes through ``.data``: no graph that has saved these tensors looks at the columns written.
        """
        used = self.used + width
        if self._has_room(width):
            self.tip[0] = used
            return Appendable(self.tensors, used, self.tip)
        copies = [x.new_empty(x.shape[0], 2 * used, *x.shape[2:]) for x in self.tensors]
        for old, copy in zip(self.columns(), copies, strict=True):
            copy[:, : self.used] = old.detach()
        return Appendable(tuple(copies), used, [used])
