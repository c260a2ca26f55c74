"""Scan on a GPU: a working row for every slot that is addressed, numbered by a sort; then chunk after chunk, without
the host ever asking what the numbers are. The loop over chunks is a loop of launches, which a CUDA graph can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.ops._log import Log
from fwpkm.ops.cuda._log import add_log_, log_backward
from fwpkm.ops.kernels.row_products import row_products
from fwpkm.ops.kernels.scan_cut import scan_cut
from fwpkm.ops.kernels.scan_read import scan_read
from fwpkm.ops.kernels.scan_write_backward import scan_write_backward
from fwpkm.ops.kernels.segment_sum import segment_sum
from fwpkm.ops.kernels.weighted_sum import weighted_sum

_NO_ROW = torch.iinfo(torch.int64).max  # the key of a row of no slot, as padding is: there is a row for every entry


def forward(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    targets: Tensor,
    gates: Tensor,
    log_slots: Tensor | None,
    log_coefficients: Tensor | None,
    log_residuals: Tensor | None,
    log_chunks: Tensor | None,
    log_lengths: Tensor | None,
    lookahead: int,
    sequences: Tensor | None,
    cut: Tensor | None,
    residual_dtype: torch.dtype,
    index_slots: int,
    index_residuals: Tensor | None,
    levels: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    require(index_residuals is None, "log", "an IndexedLog", "a Log: an index is read by the CPU implementation")
    log = _log(log_slots, log_coefficients, log_residuals, log_chunks, log_lengths, lookahead)
    memories, steps, tokens, _ = slots.shape
    n_slots, width = values.shape
    keys, n_sequences = _keys(slots, sequences, n_slots)
    local, row_keys = _number(keys)
    rows = values.new_empty(slots.numel(), width)
    source = torch.where(row_keys < _NO_ROW, row_keys % max(n_slots, 1), -1).unsqueeze(1)
    weighted_sum(rows, values.contiguous(), source, values.new_ones(source.shape))  # a copy; padding is zero
    if log is not None:
        add_log_(rows, row_keys, log, n_slots, n_sequences)

    targets, gates = targets.contiguous(), gates.contiguous()
    out = torch.empty_like(targets)
    entries = _entries(local)
    weights, coefficients = _by_chunk(weights), entries.sort(_by_chunk(coefficients))
    residuals = values.new_empty(memories * tokens, width, dtype=_stored(residual_dtype))
    for s in range(steps):
        last = s + 1 == steps  # nothing reads the version after it
        scan_read(out, None if last else residuals, rows, entries.by_token[s], weights[s], targets, gates, s)
        if not last:
            segment_sum(rows, entries.rows[s], entries.sources[s], coefficients[s], residuals)
    return out, rows, local


def backward(
    grad_out: Tensor,
    out: Tensor,
    rows: Tensor,
    local: Tensor,
    slots: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    targets: Tensor,
    gates: Tensor,
    log_slots: Tensor | None,
    log_coefficients: Tensor | None,
    log_residuals: Tensor | None,
    log_chunks: Tensor | None,
    log_lengths: Tensor | None,
    lookahead: int,
    sequences: Tensor | None,
    cut: Tensor | None,
    residual_dtype: torch.dtype,
    n_slots: int,
    values_need_grad: bool,
) -> tuple[Tensor, ...]:
    log = _log(log_slots, log_coefficients, log_residuals, log_chunks, log_lengths, lookahead)
    memories, steps, tokens, fanout = local.shape
    width = out.shape[-1]
    grad_out, out, targets, gates = (x.contiguous() for x in (grad_out, out, targets, gates))
    entries = _entries(local)
    coefficients, weights = _by_chunk(coefficients), entries.sort(_by_chunk(weights))
    undo = -entries.sort(coefficients)
    working = rows.clone(memory_format=torch.contiguous_format)  # the version that the last chunk read
    grad_rows = torch.zeros_like(working)  # G, of the version after the chunk
    grad_weights = rows.new_empty(steps, memories * tokens, fanout)
    grad_coefficients = torch.zeros_like(grad_weights)
    grad_targets, grad_gates = torch.empty_like(targets), torch.empty_like(gates)
    grad_targets[:, -1:].zero_()  # the last chunk's writes are never read
    grad_gates[:, -1:].zero_()
    residuals = rows.new_empty(memories * tokens, width, dtype=_stored(residual_dtype))
    grad_reads = rows.new_empty(memories * tokens, width)
    behind = None if cut is None else _Cut.of(cut, local, sequences)

    for s in reversed(range(steps)):
        index = entries.by_token[s]
        if s + 1 == steps:
            grad_reads.view(memories, tokens, width).copy_(grad_out[:, s])
        else:
            if behind is not None:
                behind.zero_(grad_rows, s + 1)
            written = grad_coefficients[s], grad_gates, grad_targets, grad_reads, residuals
            scan_write_backward(*written, grad_rows, index, coefficients[s], grad_out, out, targets, gates, s)
            # Rewind to the version that this chunk read: its residuals are known, so rounding is all that is lost.
            segment_sum(working, entries.rows[s], entries.sources[s], undo[s], residuals)
        row_products(grad_weights[s], working, index, grad_reads)
        segment_sum(grad_rows, entries.rows[s], entries.sources[s], weights[s], grad_reads)

    grad_log_coefficients, grad_log_residuals, grad_values = (rows.new_empty(0) for _ in range(3))
    if log is not None or values_need_grad:
        keys, n_sequences = _keys(slots, sequences, n_slots)
        row_keys = _by_row(local, keys, _NO_ROW)
        if log is not None:
            grad_log_coefficients, grad_log_residuals = log_backward(grad_rows, row_keys, log, n_slots, n_sequences)
        if values_need_grad:
            if behind is not None and steps:
                behind.zero_(grad_rows, 0)
            grad_values = _grad_values(grad_rows, row_keys, n_slots)
    by_memory = (x.view(steps, memories, tokens, fanout).transpose(0, 1) for x in (grad_weights, grad_coefficients))
    return (
        *(x.contiguous() for x in by_memory),
        grad_targets,
        grad_gates,
        grad_log_coefficients,
        grad_log_residuals,
        grad_values,
    )


def _log(slots: Tensor | None, *others: Tensor | int | None) -> Log | None:
    return None if slots is None else Log(slots, *others)  # type: ignore[arg-type]


def _stored(residual_dtype: torch.dtype) -> torch.dtype:
    """What residuals are stored in, which rounds them."""
    return torch.float32 if residual_dtype == torch.float64 else residual_dtype


def _keys(slots: Tensor, sequences: Tensor | None, n_slots: int) -> tuple[Tensor, int]:
    """Slots ``[M, S, P, K]`` numbered through all sequences of all memories: what has a working row of its own. With
    it the number of sequences of a memory, for which there is a bound: numbers that do not occur are left out.

    Slots out of range, which only ``FWPKM_CHECK`` refuses, have one row together, which is none of the values.
    """
    owner, n_sequences = torch.arange(slots.shape[0], device=slots.device).view(-1, 1, 1), 1
    if sequences is not None:
        n_sequences = sequences.numel() + 1  # 0, which the log goes with, is always one
        ascending, order = sequences.flatten().sort(stable=True)
        rank = (ascending.diff(prepend=ascending.new_zeros(1)) != 0).cumsum(0)
        owner = owner * n_sequences + torch.empty_like(order).scatter_(0, order, rank).view(sequences.shape)
    keys = torch.where((slots >= 0) & (slots < n_slots), slots + (owner * n_slots).unsqueeze(-1), _NO_ROW)
    return keys, n_sequences


def _number(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct keys, in ascending order: the number of each entry, and the keys in that order, padded."""
    ascending, order = keys.flatten().sort(stable=True)
    number = (ascending.diff(prepend=ascending[:1]) != 0).cumsum(0)
    local = torch.empty_like(order).scatter_(0, order, number).view(keys.shape)
    return local, torch.full_like(order, _NO_ROW).scatter_(0, number, ascending)


def _by_row(local: Tensor, of_entry: Tensor, of_padding: int) -> Tensor:
    """What all entries of a row have in common, ``[R]``."""
    shape = local.numel()
    return of_entry.new_full((shape,), of_padding).scatter_(0, local.flatten(), of_entry.flatten())


def _by_chunk(x: Tensor) -> Tensor:
    """``[M, S, P, K]`` -> ``[S, M * P, K]``, contiguous."""
    return x.transpose(0, 1).flatten(1, 2).contiguous()


class _Entries(NamedTuple):
    """The entries of each chunk, ``C = M * P * K`` of them, as they come and sorted by row."""

    by_token: Tensor  # [S, M * P, K] their rows
    rows: Tensor  # [S, C] int32 (or int64 where it takes that), ascending
    order: Tensor  # [S, C] sorted entries: by row, then as they came
    sources: Tensor  # [S, C] their tokens

    def sort(self, of_entry: Tensor) -> Tensor:
        """``[S, M * P, K]`` -> ``[S, C]``."""
        return of_entry.flatten(1).gather(1, self.order)


def _entries(local: Tensor) -> _Entries:
    """One sort for all chunks: row numbers are raised from chunk to chunk."""
    index = _by_chunk(local)
    steps, tokens, fanout = index.shape
    size, n_rows = tokens * fanout, local.numel()
    narrow = torch.int32 if steps * n_rows < 1 << 31 else torch.int64  # sorting takes time by the byte
    chunks = torch.arange(steps, device=local.device).unsqueeze(1)
    raised = (chunks * n_rows).to(narrow)
    ascending, order = (index.view(steps, size).to(narrow) + raised).flatten().sort(stable=True)
    order = order.view(steps, size) - chunks * size
    return _Entries(index, ascending.view(steps, size) - raised, order, order // max(fanout, 1))


class _Cut(NamedTuple):
    """Through which rows no gradient flows."""

    cut: Tensor  # [M, S]
    memories: Tensor  # [R] of each row
    sequences: Tensor  # [R] of each row; of padding the largest number

    @classmethod
    def of(cls, cut: Tensor, local: Tensor, sequences: Tensor | None) -> _Cut:
        memories = torch.arange(local.shape[0], device=local.device).view(-1, 1, 1, 1)
        numbers = torch.zeros_like(local) if sequences is None else sequences.unsqueeze(-1).expand(local.shape)
        return cls(cut.contiguous(), _by_row(local, memories.expand(local.shape), 0), _by_row(local, numbers, _NO_ROW))

    def zero_(self, grad_rows: Tensor, step: int) -> None:
        """Let nothing flow from reads in chunk ``step`` and later to what is before it."""
        scan_cut(grad_rows, self.memories, self.sequences, self.cut, step)


def _grad_values(grad_rows: Tensor, row_keys: Tensor, n_slots: int) -> Tensor:
    """Sum the rows of one slot, which each sequence of each memory has for itself."""
    grad_values = grad_rows.new_zeros(n_slots, grad_rows.shape[1])
    slots = torch.where(row_keys < _NO_ROW, row_keys % max(n_slots, 1), n_slots)
    targets, order = slots.sort(stable=True)
    segment_sum(grad_values, targets, order, torch.ones_like(order, dtype=torch.float32), grad_rows)
    return grad_values
