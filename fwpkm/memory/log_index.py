"""An index of a write log, which grows with it: reading stays cheap however long the log, on a CPU.

As in a log-structured merge tree, each extension sorts its new records into a level of their own, together with the
last levels while these are less than ``_GROWTH`` times as large: few levels, and each entry is sorted a few times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm.memory.appendable import is_transformed
from fwpkm.memory.packing import rows
from fwpkm.ops import Level, Log, implementation

_GROWTH = 8
_MANY = 16  # entries of one row in a level are added up beyond this


def can_index(*tensors: Tensor) -> bool:
    """Whether these can be looked at: on the CPU, while no graph is made and ``torch.func`` does not transform."""
    if torch.compiler.is_compiling() or implementation("cpu") != "reference":
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(x.device.type == "cpu" and type(x) in plain and not is_transformed(x) for x in tensors)


@dataclass(frozen=True)
class LogIndex:
    """The first ``covered [M]`` records of each memory by the slots (of ``n_slots``) they wrote to; immutable."""

    n_slots: int
    covered: Tensor
    levels: tuple[Level, ...] = ()

    def extend(self, log: Log) -> LogIndex:
        """The same for all records that count in ``log``, whose first :attr:`covered` are known already."""
        new = _entries(log, self.covered, self.n_slots)
        levels = list(self.levels)
        merged = [new]
        while levels and levels[-1].keys.numel() < _GROWTH * sum(level.keys.numel() for level in merged):
            merged.insert(0, levels.pop())
        return LogIndex(self.n_slots, log.lengths, (*levels, _merge(merged, log.residuals, self.n_slots)))

    def map(self, change: Callable[[Tensor], Tensor]) -> LogIndex:
        """The same with ``change`` of each tensor, which leaves what it holds as it is."""
        levels = tuple(Level(*map(change, level)) for level in self.levels)
        return LogIndex(self.n_slots, change(self.covered), levels)

    def select(self, index: Tensor) -> LogIndex:
        """Of the memories ``index``."""
        levels = tuple(_select(level, index, self.n_slots) for level in self.levels)
        return LogIndex(self.n_slots, self.covered[index], levels)

    def without(self, which: Tensor) -> LogIndex:
        """Without what it knows of the memories ``which [M]``."""

        def left(level: Level) -> Level:
            kept, sums_kept = (~which[keys // self.n_slots] for keys in (level.keys, level.sum_keys))
            return Level(*(x[kept] for x in level[:3]), *(x[sums_kept] for x in level[3:]))

        covered = torch.where(which, 0, self.covered)
        return dataclasses.replace(self, covered=covered, levels=tuple(map(left, self.levels)))


def _entries(log: Log, first: Tensor, n_slots: int) -> Level:
    """A level of the records of whole chunks from ``first [M]`` on; nothing is added up yet."""
    memories, _, fanout = log.slots.shape
    width = int((log.lengths - first).max())
    record = first.unsqueeze(1) + torch.arange(width)
    counts_in = record < log.lengths.unsqueeze(1)
    record = record.clamp_max(log.slots.shape[1] - 1)
    slots, chunks = rows(log.slots, record), rows(log.chunks, record)
    memory = torch.arange(memories).view(-1, 1, 1)
    nowhere = memories * n_slots
    keys = torch.where(counts_in.unsqueeze(-1) & (slots >= 0), memory * n_slots + slots, nowhere)
    keys, order = keys.flatten().sort(stable=True)  # a row's entries stay in the order of their chunks
    used = int(torch.searchsorted(keys, nowhere))
    keys, order = keys[:used], order[:used]
    token = order // fanout
    chunk = chunks.flatten()[token]
    span = int(chunk.max()) + 1 if used else 1
    _, counts = (keys * span + chunk).unique_consecutive(return_counts=True)
    weights = rows(log.coefficients.detach(), record).flatten()[order] / counts.repeat_interleave(counts)
    record, of_memory = record.flatten()[token], keys // n_slots
    carrier = record + log.lookahead
    stored = carrier < log.lengths[of_memory]
    stored &= log.chunks[of_memory, carrier.clamp_max(log.chunks.shape[1] - 1)] == chunk
    none = keys.new_empty(0)
    sums = weights.new_empty(0, log.residuals.shape[2])
    return Level(keys[stored], carrier[stored], weights[stored], none, sums)


def _merge(levels: list[Level], residuals: Tensor, n_slots: int) -> Level:
    """One level of several, older ones first, with rows of many entries added up."""
    keys, records, weights, sum_keys, sums = (torch.cat(parts) for parts in zip(*levels, strict=True))
    if len(levels) > 1:
        keys, order = keys.sort(stable=True)
        records, weights = records[order], weights[order]
    distinct, counts = keys.unique_consecutive(return_counts=True)
    many = (counts > _MANY).repeat_interleave(counts)
    if bool(many.any()):
        added = _sums(keys[many], records[many], weights[many], residuals, n_slots)
        sum_keys, sums = torch.cat((sum_keys, distinct[counts > _MANY])), torch.cat((sums, added))
        keys, records, weights = (x[~many] for x in (keys, records, weights))
    if len(levels) > 1 or bool(many.any()):
        sum_keys, place = sum_keys.unique(return_inverse=True)
        sums = sums.new_zeros(sum_keys.numel(), sums.shape[1]).index_add_(0, place, sums)
    return Level(keys, records, weights, sum_keys, sums)


def _sums(keys: Tensor, records: Tensor, weights: Tensor, residuals: Tensor, n_slots: int) -> Tensor:
    """What entries, sorted by row, add to each of their rows."""
    _, counts = keys.unique_consecutive(return_counts=True)
    table, index = residuals.detach().flatten(0, 1), keys // n_slots * residuals.shape[1] + records
    if table.dtype != weights.dtype:
        used, index = index.unique(return_inverse=True)
        table = table[used].to(weights.dtype)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return torch.nn.functional.embedding_bag(
        index, table, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def _select(level: Level, index: Tensor, n_slots: int) -> Level:
    """A level of the memories ``index``."""
    bounds = torch.stack((index, index + 1)) * n_slots
    parts = []
    for keys, others in ((level.keys, level[1:3]), (level.sum_keys, level[4:])):
        first, end = torch.searchsorted(keys, bounds)
        counts = end - first
        memory = torch.arange(index.numel()).repeat_interleave(counts)
        entry = torch.arange(memory.numel()) + (first - counts.cumsum(0) + counts)[memory]
        parts += [keys[entry] + (memory - index[memory]) * n_slots, *(x[entry] for x in others)]
    return Level(*parts)
