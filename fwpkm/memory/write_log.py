"""The write log: one record a token, from which with the base values everything a sequence stored can be had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm.memory.appendable import Appendable
from fwpkm.memory.formulas import reads_of_slot
from fwpkm.memory.log_index import LogIndex
from fwpkm.ops import Log


@dataclass(frozen=True)
class WriteLog:
    """The records of ``M`` memories, in the order in which each saw its tokens; immutable (DESIGN section 3).

    Record ``t`` is a function of what came before token ``t + 1`` and is never rewritten, wherever a call ends; only
    an early flush, which changes a chunk's length, scales the coefficients of that chunk. How many records of a memory
    there are, and how many are of committed chunks, is in the state that holds the log.

    Attributes:
        records: ``slots [M, R, K]`` (-1 in a record of a token that did not read), ``coefficients [M, R, K]`` before
            the division by ``N_s``, ``residuals [M, R, Dv]`` of the token ``lookahead`` records before (0 if that is
            in another chunk), ``chunks [M, R]``, ``gates [M, R]``.
        lookahead: in records.
        index: of the first records, as far as reading has made one.
    """

    records: Appendable
    lookahead: int
    index: LogIndex | None = None

    @property
    def slots(self) -> Tensor:
        return self.records.tensors[0]

    @property
    def coefficients(self) -> Tensor:
        return self.records.tensors[1]

    @property
    def residuals(self) -> Tensor:
        return self.records.tensors[2]

    @property
    def chunks(self) -> Tensor:
        return self.records.tensors[3]

    @property
    def gates(self) -> Tensor:
        return self.records.tensors[4]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.records.tensors)

    def first(self, lengths: Tensor) -> Log:
        """The first ``lengths [M]`` records of each memory, as operators take them."""
        return Log(self.slots, self.coefficients, self.residuals, self.chunks, lengths, self.lookahead)

    def indexed(self, lengths: Tensor, n_slots: int) -> WriteLog:
        """The same with an index of the first ``lengths [M]`` records, all of committed chunks."""
        index = self.index or LogIndex(n_slots, torch.zeros_like(lengths))
        if bool((index.covered == lengths).all()):
            return self
        return dataclasses.replace(self, index=index.extend(self.first(lengths)))

    def select(self, index: Tensor) -> WriteLog:
        """Of the memories ``index``, a copy."""
        kept = None if self.index is None else self.index.select(index)
        return dataclasses.replace(self, records=self.records.select(index), index=kept)

    def writes(self, lengths: Tensor, n_slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """What each memory's first ``lengths [M]`` records add to the values of all memories ``[M * N, Dv]``.

        Returns slots ``[M * R, K]``, coefficients, divided by ``N_s``, and residuals ``[M * R, Dv]``, each beside the
        slots that it is written to.
        """
        memory = torch.arange(self.slots.shape[0], device=lengths.device).unsqueeze(1)
        index = torch.arange(self.slots.shape[1], device=lengths.device)
        counts_in = (index < lengths.unsqueeze(1)).unsqueeze(-1) & (self.slots >= 0)
        slots = torch.where(counts_in, self.slots, 0)
        # entries that do not count are a chunk of their own, and write nothing
        chunk = torch.where(counts_in, self.chunks.unsqueeze(-1), -1) * memory.numel() + memory.unsqueeze(-1)
        counts = reads_of_slot(slots.flatten(1).unsqueeze(-1), chunk.flatten(1), n_slots).view(slots.shape)
        carrier = (index + self.lookahead).clamp_max(index.numel() - 1)
        stored = (index + self.lookahead < lengths.unsqueeze(1)) & (self.chunks[:, carrier] == self.chunks)
        stored = stored.unsqueeze(-1)
        coefficients = torch.where(counts_in & stored, self.coefficients / counts, 0.0)
        residuals = torch.where(stored, self.residuals[:, carrier].to(coefficients.dtype), 0.0)
        slots = slots + (memory * n_slots).unsqueeze(-1)
        return slots.flatten(0, 1), coefficients.flatten(0, 1), residuals.flatten(0, 1)

    def map(self, change: Callable[[Tensor], Tensor]) -> WriteLog:
        """The same with ``change`` of each tensor, which leaves what it holds as it is."""
        index = None if self.index is None else self.index.map(change)
        return dataclasses.replace(self, records=self.records.map(change), index=index)

    def detach_before(self, chunk: Tensor) -> WriteLog:
        """The same, with each memory's records of chunks below ``chunk [M]`` cut from the graph that computed them."""
        if not (self.coefficients.requires_grad or self.residuals.requires_grad):
            return self
        old = (self.chunks < chunk.unsqueeze(1)).unsqueeze(-1)
        slots, coefficients, residuals, chunks, gates = self.records.tensors
        coefficients, residuals = (torch.where(old, x.detach(), x) for x in (coefficients, residuals))
        return dataclasses.replace(self, records=Appendable.of((slots, coefficients, residuals, chunks, gates)))

    def with_residuals_in(self, dtype: torch.dtype) -> WriteLog:
        """The same with residuals kept in ``dtype``: a state goes on in training, which does not round."""
        if self.residuals.dtype == dtype:
            return self
        slots, coefficients, residuals, *others = self.records.tensors
        kept = Appendable((slots, coefficients, residuals.to(dtype), *others), self.records.used, self.records.tip)
        return dataclasses.replace(self, records=kept.unshared())

    def scale(self, first: Tensor, factor: Tensor) -> WriteLog:
        """The same with the coefficients of each memory's records from ``first [M]`` on times ``factor [M]``."""
        index = torch.arange(self.slots.shape[1], device=self.slots.device)
        is_open = (index >= first.unsqueeze(1)).unsqueeze(-1)
        slots, coefficients, *others = self.records.tensors
        coefficients = torch.where(is_open, coefficients * factor.to(coefficients.dtype).view(-1, 1, 1), coefficients)
        scaled = Appendable((slots, coefficients, *others), self.records.used, self.records.tip).unshared()
        return dataclasses.replace(self, records=scaled)
