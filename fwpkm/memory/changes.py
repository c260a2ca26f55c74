"""What a memory has stored, apart from the starting point that it belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
        """Change ``weights`` in place: of the values only the rows that were written to."""
        if self.values is not None:
            weights.values.copy_(self.values)
        if self.writes is not None:
            memory_write_(weights.values.detach(), *self.writes)
        if self.keys is not None:
            weights.all_keys.copy_(self.keys)
