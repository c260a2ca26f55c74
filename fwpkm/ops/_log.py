"""The write log as operators see it, and what of it concerns a set of rows."""

from typing import NamedTuple

import torch
from torch import Tensor


class Log(NamedTuple):
    """What was written before the scan: records of tokens in their order, of which the first ``lengths`` count.

    A record is a function of its token's past only (DESIGN section 3): it holds its token's slots and its coefficients
    *before* the division by ``N_s``, the reads of a slot within a chunk, which is derived from the records; and the
    residual of the token ``lookahead`` records earlier, which that token's target was needed for. A token writes if
    the record with its residual counts and belongs to the same chunk.
    """

    slots: Tensor  # [M, R, K] int64; -1: a read that does not exist
    coefficients: Tensor  # [M, R, K]
    residuals: Tensor  # [M, R, Dv], dtype of the values or bfloat16
    chunks: Tensor  # [M, R] int64, the number of the chunk that a record belongs to
    lengths: Tensor  # [M] int64
    lookahead: int


class Matches(NamedTuple):
    """The log's entries (slot ``j`` of a record) that wrote to a row of the working set, ``E`` of them."""

    entries: Tensor  # [E] into the log's flattened slots
    carriers: Tensor  # [E] the record with the entry's residual, into the flattened records
    rows: Tensor  # [E] the working row it wrote to
    counts: Tensor  # [E] N_s: entries of the same chunk with the same slot

    def weights(self, log_coefficients: Tensor) -> Tensor:
        """The entries' coefficients with the division by ``N_s``."""
        return log_coefficients.flatten()[self.entries] / self.counts

    def residuals(self, log: Log, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A table of residuals in ``dtype``, and the row of each entry in it."""
        table = log.residuals.reshape(-1, log.residuals.shape[2])
        if table.dtype == dtype:
            return table, self.carriers
        used, rows = self.carriers.unique(return_inverse=True)
        return table[used].to(dtype), rows


def match(keys: Tensor, log: Log, n_slots: int, n_sequences: int) -> Matches:
    """Find the log's entries among the sorted row numbers ``keys [R]``: slot ``s`` of memory ``m`` is number
    ``m * n_sequences * n_slots + s``, in the first of its sequences.
    """
    memories, records, fanout = log.slots.shape
    counts_in = torch.arange(records, device=log.lengths.device) < log.lengths.unsqueeze(1)
    own = log.slots + (torch.arange(memories, device=log.slots.device) * n_sequences * n_slots).view(-1, 1, 1)
    own = torch.where(counts_in.unsqueeze(-1) & (log.slots >= 0), own, -1).flatten()
    position = torch.searchsorted(keys, own).clamp_max_(keys.numel() - 1)
    entries = (keys[position] == own).nonzero().squeeze(-1) if keys.numel() else own.new_empty(0)
    rows, record = position[entries], entries // fanout
    all_chunks = log.chunks.flatten()
    chunks = all_chunks[record]
    first, last = chunks.aminmax() if entries.numel() else (chunks.new_zeros(()), chunks.new_zeros(()))
    _, inverse, counts = (rows * (last - first + 1) + chunks - first).unique(return_inverse=True, return_counts=True)
    carriers = record + log.lookahead
    writes = record % records + log.lookahead < log.lengths[record // records] if records else carriers > 0
    writes &= all_chunks[carriers.clamp_max(all_chunks.numel() - 1)] == chunks
    return Matches(*(x[writes] for x in (entries, carriers, rows, counts[inverse])))
