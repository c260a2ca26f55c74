"""A long write log, added up: dense rows in pages, which a request has of its own. Nothing here knows vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm.memory import MemoryConfig
from fwpkm.memory.formulas import reads_of_slot
from fwpkm.ops import memory_write_


@dataclass(frozen=True)
class Folded:
    """What the records of each request's whole stretches add to the base values.

    A stretch is ``stretch`` tokens, whole chunks and whole blocks. Version ``v`` of the rows is the sum over the first
    ``v`` stretches: a function of these tokens, made in the step that completes the last of them, and never rewritten.

    Attributes:
        rows: ``[blocks, page, Dv]``, slot ``s`` of a version in row ``s % page`` of its page ``s // page``.
        table: ``[R, B]``, the blocks of each request: those of version 1, of version 2, ...; only those of the version
            that a request reads, and of the one that it makes, have to be its own.
        stretch: tokens.
        pages: blocks of a version.
        due: requests that complete a stretch in this step, and the version to make.
    """

    rows: Tensor
    table: Tensor
    stretch: int
    pages: int
    due: Sequence[tuple[int, int]]

    def covered(self, computed: Tensor) -> Tensor:
        """How many records of requests that have computed so many tokens are in their rows."""
        return computed // self.stretch * self.stretch

    def read(self, slots: Tensor, weights: Tensor, requests: Tensor, computed: Tensor) -> Tensor:
        """``sum_j weights[t, j] * rows[slots[t, j]]`` of the requests ``[T]``, which have computed so many tokens.

        ``[T, Dv]``; 0 where there are no rows yet.
        """
        version, page = computed // self.stretch, self.rows.shape[1]
        there = version > 0
        column = (version - 1).unsqueeze(1) * self.pages + slots // page
        column = torch.where(there.unsqueeze(1), column, 0)
        block, offset = self.table[requests.unsqueeze(1), column].long(), slots % page
        block = torch.where(there.unsqueeze(1), block, 0)
        out = weights.new_zeros(slots.shape[0], self.rows.shape[2])
        for j in range(slots.shape[1]):  # not all at once: a copy of that many rows would be K times the output
            out += weights[:, j : j + 1] * self.rows[block[:, j], offset[:, j]]
        return torch.where(there.unsqueeze(1), out, 0)

    def make(
        self,
        request: int,
        version: int,
        slots: Tensor,
        coefficients: Tensor,
        residuals: Tensor,
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
        reads = reads_of_slot(slots, chunk, self.pages * self.rows.shape[1])
        coefficients = torch.where(stored.unsqueeze(1), coefficients / reads, 0.0)
        residuals = torch.where(stored.unsqueeze(1), residuals[carrier], 0.0)
        if version > 1:
            rows = self.rows[self._blocks(request, version - 1)].flatten(0, 1)
        else:
            rows = self.rows.new_zeros(self.pages * self.rows.shape[1], self.rows.shape[2])
        memory_write_(rows, slots, coefficients, residuals)
        self.rows[self._blocks(request, version)] = rows.unflatten(0, (self.pages, -1))

    def _blocks(self, request: int, version: int) -> Tensor:
        return self.table[request, (version - 1) * self.pages : version * self.pages].long()
