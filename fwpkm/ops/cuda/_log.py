"""The write log on a GPU: what of it concerns a set of rows, with shapes that do not depend on how much that is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fwpkm.ops._log import Log
from fwpkm.ops.kernels.row_products import row_products
from fwpkm.ops.kernels.segment_sum import segment_sum
from fwpkm.ops.kernels.weighted_sum import weighted_sum


class Matches(NamedTuple):
    """For every entry (slot ``j`` of a record) whether and how it wrote to one of ``n_rows`` working rows."""

    rows: Tensor  # [M, R, K] the row it wrote to; n_rows, which is none, if it did not write to any
    weights: Tensor  # [M, R, K] its coefficient over N_s
    counts: Tensor  # [M, R, K] N_s: entries of the same chunk with the same slot; 1 where there is no row
    order: Tensor  # [M * R * K] entries, by row and then by chunk; those without a row last


def match(row_keys: Tensor, log: Log, n_slots: int, n_sequences: int) -> Matches:
    """Find the log's entries among the ascending row numbers ``row_keys [n_rows]``: slot ``s`` of memory ``m`` is
    number ``m * n_sequences * n_slots + s``, in the first of its sequences. There is a row, and an entry.
    """
    memories, records, _ = log.slots.shape
    device, n_rows = row_keys.device, row_keys.numel()
    owners = torch.arange(memories, device=device).view(-1, 1, 1) * (n_sequences * n_slots)
    record = torch.arange(records, device=device)
    counts_in = record < log.lengths.unsqueeze(1)
    own = torch.where(counts_in.unsqueeze(-1) & (log.slots >= 0), log.slots + owners, -1)
    position = torch.searchsorted(row_keys, own.contiguous()).clamp_max_(n_rows - 1)
    found = row_keys[position] == own
    carrier = record + log.lookahead
    writes = carrier < log.lengths.unsqueeze(1)
    writes &= log.chunks[:, carrier.clamp_max(records - 1)] == log.chunks
    writes = writes.unsqueeze(-1)

    # One sort serves the sums, in which only entries that write have a part, and the counts, in which all have.
    largest = torch.iinfo(torch.int64).max
    first = torch.where(counts_in, log.chunks, largest).amin()
    n_chunks = torch.where(counts_in, log.chunks, first).amax() - first + 1
    key = position * n_chunks + (log.chunks - first).unsqueeze(-1)
    idle = n_rows * n_chunks  # what the key of an entry is raised by that does not write
    own_key = torch.where(found, key + ~writes * idle, largest)
    ascending, order = own_key.flatten().sort(stable=True)
    key = torch.where(found, key, 0)
    counts = sum(
        torch.searchsorted(ascending, x, right=True) - torch.searchsorted(ascending, x) for x in (key, key + idle)
    )
    found &= writes
    counts = torch.where(found, counts, 1)
    weights = log.coefficients.contiguous() / counts
    return Matches(torch.where(found, position, n_rows), weights, counts, order)


def add_log_(rows: Tensor, row_keys: Tensor, log: Log, n_slots: int, n_sequences: int) -> None:
    """Add to the working ``rows [n_rows, Dv]`` what the log wrote to them."""
    if log.slots.numel() == 0 or rows.numel() == 0:
        return
    matches, fanout = match(row_keys, log, n_slots, n_sequences), log.slots.shape[2]
    targets, weights = (x.flatten()[matches.order] for x in (matches.rows, matches.weights))
    # past the last record only where there is no row
    carriers = matches.order // fanout + log.lookahead
    segment_sum(rows, targets, carriers, weights, log.residuals.flatten(0, 1).contiguous())


def log_backward(
    grad_rows: Tensor, row_keys: Tensor, log: Log, n_slots: int, n_sequences: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the log's coefficients and residuals, from those of the working rows, ``[n_rows, Dv]``."""
    grad_coefficients = log.coefficients.new_empty(log.coefficients.shape)
    grad_residuals = log.residuals.new_empty(log.residuals.shape)
    if log.slots.numel() == 0 or grad_rows.numel() == 0:
        return grad_coefficients.zero_(), grad_residuals.zero_()
    matches, (memories, records, _) = match(row_keys, log, n_slots, n_sequences), log.slots.shape
    carriers = torch.arange(memories * records, device=grad_rows.device) + log.lookahead
    row_products(
        grad_coefficients.flatten(0, 1),
        grad_rows,
        matches.rows.flatten(0, 1),
        log.residuals.flatten(0, 1).contiguous(),
        carriers.clamp_max_(memories * records - 1),
    )
    ahead = min(log.lookahead, records)  # a record carries the residual of the token so many before it
    rows = pad(matches.rows[:, : records - ahead], (0, 0, ahead, 0), value=grad_rows.shape[0])
    weights = pad(matches.weights[:, : records - ahead], (0, 0, ahead, 0))
    weighted_sum(grad_residuals.flatten(0, 1), grad_rows, rows.flatten(0, 1), weights.flatten(0, 1))
    return grad_coefficients.div_(matches.counts), grad_residuals
