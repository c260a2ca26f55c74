"""Where a read comes from: the exact split into what the memory started from and what each token stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require, require_shape
from fwpkm.memory.state import MemoryState
from fwpkm.ops import memory_read

_TERMS = 1 << 18  # that are looked at together


class Split(NamedTuple):
    """Reads of ``P`` tokens: ``read[p] = base[p] + sum of amounts[e] * stored[sources[e]] over readers[e] == p``.

    There is one term for each pair of a read and a record that wrote to one of its slots, ordered by reader, then by
    source.
    """

    base: Tensor  # [P, Dv] the part that was there before the log: of the starting point
    readers: Tensor  # [E] in [0, P)
    sources: Tensor  # [E] number of the record: of the token that stored, at the address it had
    amounts: Tensor  # [E]
    stored: Tensor  # [R, Dv] the residual that each record's token stored

    def contributions(self) -> Tensor:
        """What each term adds to its read, ``[E, Dv]``."""
        return self.amounts.unsqueeze(1) * self.stored[self.sources]

    def reads(self) -> Tensor:
        """The sum of all parts, ``[P, Dv]``: what the memory gave, but for rounding."""
        return self._sums(self.amounts)

    def shares(self, reads: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the base ``[P]`` and of each term ``[E]`` in ``reads [P, Dv]``; those of a read add up to 1.

        A part's share is its projection on the read over the read itself, ``<part, read> / <read, read>``: negative for
        a part that points away from the read. All shares of a read that is 0 are 0.
        """
        norm = reads.square().sum(1)
        scale = torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)
        with torch.enable_grad():  # <stored, read> is how the sum's product with the read grows with an amount
            amounts = self.amounts.detach().requires_grad_()
            (products,) = torch.autograd.grad(self._sums(amounts), amounts, reads)
        return (self.base * reads).sum(1) * scale, self.amounts * products * scale[self.readers]

    def _sums(self, amounts: Tensor) -> Tensor:
        """Bases and terms with these amounts, added up without holding the terms."""
        first = torch.searchsorted(self.readers, torch.arange(self.base.shape[0], device=self.readers.device))
        return self.base + torch.nn.functional.embedding_bag(
            self.sources, self.stored, first, per_sample_weights=amounts, mode="sum"
        )


class Strongest(NamedTuple):
    """What reads are made of, in shares: the base, and the sources with the largest shares in size."""

    base: Tensor  # [P]
    sources: Tensor  # [P, top] number of the record; -1 where there are fewer
    shares: Tensor  # [P, top]; 0 where there are fewer
    error: float  # largest difference of a number of a read and the sum of its parts


@dataclass(frozen=True)
class Writes:
    """All that a memory (``M = 1``) has committed to its log, by slot."""

    values: Tensor  # [N, Dv] what the log adds to
    stored: Tensor  # [R, Dv]
    keys: Tensor  # [E] slot * R + record, ascending
    amounts: Tensor  # [E] coefficients, divided by N_s

    @classmethod
    @torch.no_grad()
    def of(cls, state: MemoryState) -> Writes:
        """Those of a state of one sequence; a log that was folded is a part of the base.

        Raises:
            ValueError: for several memories, or memories that share a batch, or tokens that were masked.
        """
        require(state.memories == 1, "memories", state.memories, "1: reads of one memory are split")
        require(state.columns == 1, "columns", state.columns, "1: a memory of one sequence")
        require(not state.ragged, "state", "one that has read with a mask or a reset", "one that has read every token")
        values = state.values.detach()
        if state.log is None:
            none = values.new_empty(0)
            return cls(values, values.new_empty(0, values.shape[1]), none.long(), none)
        log = state.log.map(Tensor.detach)
        slots, amounts, stored = log.writes(state.per_memory(state.committed), state.n_slots)
        records = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
        wrote = (amounts != 0) & stored.any(1, keepdim=True)
        keys, order = (slots * slots.shape[0] + records)[wrote].sort(stable=True)
        return cls(values, stored, keys, amounts[wrote][order])

    def matches(self, slots: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The range ``[first, end)`` of writes to each slot ``[P, K]`` by the first ``seen [P]`` records."""
        records = self.stored.shape[0]
        first = torch.searchsorted(self.keys, slots * records)
        return first, torch.searchsorted(self.keys, slots * records + seen.unsqueeze(1))

    @torch.no_grad()
    def split(self, slots: Tensor, weights: Tensor, seen: Tensor) -> Split:
        """Split the reads of ``slots`` with ``weights [P, K]`` of a memory that had committed ``seen [P]`` records."""
        require_shape("slots", slots, ("P", "K"))
        require_shape("weights", weights, slots.shape)
        require_shape("seen", seen, slots.shape[:1])
        fanout, records = slots.shape[1], max(1, self.stored.shape[0])
        first, end = self.matches(slots, seen)
        counts = (end - first).flatten()
        read = torch.arange(counts.numel(), device=slots.device).repeat_interleave(counts)
        write = torch.arange(read.numel(), device=slots.device) + (first.flatten() - counts.cumsum(0) + counts)[read]
        pairs = read // fanout * records + self.keys[write] % records
        pairs, place = pairs.unique(return_inverse=True)  # a source that is met at several slots is one
        terms = weights.flatten()[read] * self.amounts[write]
        amounts = terms.new_zeros(pairs.numel()).index_add_(0, place, terms)
        base = memory_read(self.values, slots, weights)
        return Split(base, pairs // records, pairs % records, amounts, self.stored)

    @torch.no_grad()
    def strongest(self, slots: Tensor, weights: Tensor, seen: Tensor, reads: Tensor, top: int) -> Strongest:
        """The strongest sources of many ``reads [P, Dv]``, split piece by piece in bounded space.

        Args:
            slots: ``[P, K]``.
            weights: ``[P, K]``.
            seen: ``[P]`` records that the memory had committed.
            reads: ``[P, Dv]`` what it gave.
            top: sources a read.
        """
        require(top >= 1, "top", top, "a positive integer")
        require_shape("reads", reads, (slots.shape[0], self.values.shape[1]))
        parts, errors = [], []
        for piece in self._pieces(slots, seen):
            split = self.split(slots[piece], weights[piece], seen[piece])
            errors.append((split.reads() - reads[piece]).abs().max())
            base, shares = split.shares(reads[piece])
            parts.append((base, *_top(split, shares, top)))
        base, sources, shares = (torch.cat(x) for x in zip(*parts, strict=True))
        return Strongest(base, sources, shares, float(torch.stack(errors).max()))

    def _pieces(self, slots: Tensor, seen: Tensor) -> Iterator[slice]:
        """Runs of reads with a bounded number of slots and matches together, or of a single read."""
        first, end = self.matches(slots, seen)
        group = (end - first + 1).sum(1).cumsum(0) // _TERMS
        start = 0
        for size in group.unique_consecutive(return_counts=True)[1].tolist():
            yield slice(start, start + size)
            start += size


def _top(split: Split, shares: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Of each reader the ``top`` sources with the largest shares in size, ``[P, top]``, and these."""
    order = shares.abs().argsort(descending=True, stable=True)
    order = order[split.readers[order].argsort(stable=True)]
    readers = split.readers[order]
    rank = torch.arange(readers.numel(), device=readers.device) - torch.searchsorted(readers, readers)
    chosen = rank < top
    place = readers[chosen] * top + rank[chosen]
    size = split.base.shape[0] * top
    sources = split.sources.new_full((size,), -1).index_copy_(0, place, split.sources[order][chosen])
    largest = shares.new_zeros(size).index_copy_(0, place, shares[order][chosen])
    return sources.view(-1, top), largest.view(-1, top)


@torch.no_grad()
def seen_by_own_tokens(state: MemoryState) -> Tensor:
    """For every token in the log of ``state`` (``M = 1``), how many records its read could see: those of chunks before
    its own. ``[R]``.
    """
    require(state.memories == 1, "memories", state.memories, "1: reads of one memory are split")
    if state.log is None:
        return torch.empty(0, dtype=torch.int64, device=state.keys.device)
    chunks = state.log.records.columns()[3][0].contiguous()
    return torch.searchsorted(chunks, chunks)
