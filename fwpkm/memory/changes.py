"""What a memory has stored, apart from the starting point that it belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.memory.fast_weights import FastWeights
from fwpkm.ops import memory_write_


class Changes(NamedTuple):
    """What writes a memory into its starting point; detached tensors only, so that a graph for one is one for all."""

    writes: tuple[Tensor, Tensor, Tensor] | None  # slots and coefficients [R, K], residuals [R, Dv]
    keys: Tensor | None  # [1, H, 2, n, Dk/2], if they have moved
    values: Tensor | None  # [N, Dv], in the place of what the writes are added to

    @classmethod
    def none(cls, weights: FastWeights, reads: int) -> Changes:
        """No changes of ``weights``, as those of tokens that read ``reads`` slots each: tensors without a row."""
        slots = weights.values.new_empty(0, reads, dtype=torch.int64)
        return cls(
            (slots, weights.values.new_empty(0, reads), weights.values.new_empty(0, weights.values.shape[1])),
            None,
            None,
        )

    @torch.no_grad()
    def apply_(self, weights: FastWeights) -> None:
        """Change ``weights`` in place: of the values only the rows that were written to.

        The weights may have come to another device or dtype since, but for the meta device, where nothing is stored:
        changes made there are none.

        Raises:
            ValueError: if ``weights`` are on the meta device and there are changes.
        """
        if any(x.is_meta for x in self.tensors()):
            return
        target = weights.values
        if target.is_meta:
            stored = sum(x.shape[0] for x in self.tensors())
            require(stored == 0, "weights.values.device", "meta", "a device that holds what a memory stores")
            return
        if self.values is not None:
            weights.values.copy_(self.values)
        if self.writes is not None and self.writes[0].shape[0]:  # no write is none, also where torch.func refuses them
            slots, *others = self.writes
            memory_write_(target.detach(), slots.to(target.device), *(x.to(target) for x in others))
        if self.keys is not None:
            weights.all_keys.copy_(self.keys)

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [x for x in (*(self.writes or ()), self.keys, self.values) if x is not None]
