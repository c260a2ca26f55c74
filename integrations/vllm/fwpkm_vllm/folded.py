"""A long write log, added up: dense rows in pages, which a request has of its own. Nothing here knows vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm.memory import MemoryConfig
from fwpkm.memory.formulas import reads_of_slot
from fwpkm.ops import memory_write_
from fwpkm_vllm.paged import Versions


@dataclass(frozen=True)
class Folded:
    """What the records of each request's whole stretches add to the base values: version ``v`` of the rows, the sum
    over the first ``v`` stretches.

    Attributes:
        versions: the rows, one a slot.
        stretch: tokens, whole chunks and whole blocks.
        due: requests that complete a stretch in this step, and the version to make.
    """

    versions: Versions
    stretch: int
    due: Sequence[tuple[int, int]]

    def version(self, computed: Tensor) -> Tensor:
        """The number of the rows that there are once so many tokens have been computed; 0 for none yet."""
        return computed // self.stretch

    def read(self, slots: Tensor, weights: Tensor, requests: Tensor, version: Tensor) -> Tensor:
        """``sum_j weights[t, j] * rows[slots[t, j]]`` of the requests ``[T]``, in the ``version [T]`` of their rows.

        ``[T, Dv]``; 0 in version 0.
        """
        rows, there = self.versions.rows, (version > 0).unsqueeze(1)
        block, offset = self.versions.places(requests, version.clamp_min(1), torch.where(there, slots, 0))
        block = torch.where(there, block, 0)
        out = weights.new_zeros(slots.shape[0], rows.shape[2])
        for j in range(slots.shape[1]):  # not all at once: a copy of that many rows would be K times the output
            out += weights[:, j : j + 1] * rows[block[:, j], offset[:, j]]
        return torch.where(there, out, 0)

    def make(
        self,
        request: int,
        version: int,
        slots: Tensor,
        coefficients: Tensor,
        residuals: Tensor,
        n_slots: int,
        config: MemoryConfig,
    ) -> None:
        """Write a request's rows after its ``version``-th stretch, from those before it and the stretch's records.

        ``slots``, ``coefficients [S, K]`` and ``residuals [S, Dv]`` as they are in the log.
        """
        record = torch.arange(self.stretch, device=slots.device)
        chunk = record // config.chunk_size
        carrier = (record + config.lookahead).clamp_max(self.stretch - 1)
        stored = (carrier - record == config.lookahead) & (carrier // config.chunk_size == chunk)
        slots = slots.long()
        reads = reads_of_slot(slots, chunk, n_slots)
        coefficients = torch.where(stored.unsqueeze(1), coefficients / reads, 0.0)
        residuals = torch.where(stored.unsqueeze(1), residuals[carrier], 0.0)
        owner, number = (torch.full((1,), x, device=slots.device) for x in (request, version))
        if version > 1:
            rows = self.versions.get(owner, number - 1, n_slots)[0]
        else:
            rows = self.versions.rows.new_zeros(n_slots, residuals.shape[1])
        memory_write_(rows, slots, coefficients, residuals)
        self.versions.put(owner, number, rows.unsqueeze(0))
