"""Scan (DESIGN 2.4 to 2.6, section 5): read and commit chunk after chunk, on the touched rows only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require_dtype, require_fast_weight_dtype, require_shape, require_slots
from fwpkm.ops._library import refuse_double_backward, register, register_backward
from fwpkm.ops._rows import add_to_rows_, row_products, segment, token_of_entry, weighted_sum


class Log(NamedTuple):
    """What was written before the scan: one record a token, all of committed chunks.

    ``coefficients`` are those before the division by ``N_s``, the reads of a slot within its chunk, which is derived
    from the records: they are a function of the past of their token only.
    """

    slots: Tensor  # [M, R, K] int64
    coefficients: Tensor  # [M, R, K]
    residuals: Tensor  # [M, R, Dv]
    chunks: Tensor  # [M, R] int64, the number of the chunk that a record belongs to


def memory_scan(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    targets: Tensor,
    gates: Tensor,
    log: Log | None = None,
) -> Tensor:
    """Read and write ``S`` chunks of ``P`` tokens in ``M`` memories that start from the same values.

    Version 0 of memory ``m`` is ``values`` (not changed, never copied) plus its log. For ``s = 0 .. S-1``: ``out_s``
    is the read of version ``s`` (paper, equation 6), then ``V += coefficients * (gates * (targets - out_s))``
    (equations 13 to 15). Time and memory depend on ``M * S * P * K * Dv`` and the length of the log, never on ``N``.

    Args:
        values: ``[N, Dv]``, float32 (float64 for numerical checks).
        slots: ``[M, S, P, K]`` int64 in ``[0, N)``.
        weights, coefficients: ``[M, S, P, K]``, dtype of ``values``; coefficients include learning rate, write scale
            and the division by ``N_s``.
        targets: ``[M, S, P, Dv]``, dtype of ``values``.
        gates: ``[M, S, P]``, dtype of ``values``.
        log: the records of earlier chunks, or None.

    Returns:
        ``out [M, S, P, Dv]``. Gradients flow to ``weights``, ``coefficients``, ``targets``, ``gates``, the log's
        coefficients and residuals, and, as a dense ``[N, Dv]`` tensor, to ``values`` when they require one.

    Raises:
        ValueError: for a wrong shape or dtype, or a slot out of range.
    """
    require_shape("values", values, ("N", "Dv"))
    require_fast_weight_dtype("values", values)
    require_shape("slots", slots, ("M", "S", "P", "K"))
    memories, _, _, fanout = slots.shape
    width = values.shape[1]
    require_dtype("slots", slots, torch.int64)
    floats = {
        "weights": (weights, slots.shape),
        "coefficients": (coefficients, slots.shape),
        "targets": (targets, (*slots.shape[:3], width)),
        "gates": (gates, slots.shape[:3]),
    }
    if log is not None:
        records = log.slots.shape[1] if log.slots.dim() > 1 else 0
        require_shape("log.slots", log.slots, (memories, "R", fanout))
        require_dtype("log.slots", log.slots, torch.int64)
        require_shape("log.chunks", log.chunks, (memories, records))
        require_dtype("log.chunks", log.chunks, torch.int64)
        floats["log.coefficients"] = (log.coefficients, log.slots.shape)
        floats["log.residuals"] = (log.residuals, (memories, records, width))
    for name, (tensor, shape) in floats.items():
        require_shape(name, tensor, shape)
        require_dtype(name, tensor, values.dtype)
    out, _, _ = _operator(values, slots, weights, coefficients, targets, gates, *(log or (None,) * 4))
    return out


def _cpu(
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
) -> tuple[Tensor, Tensor, Tensor]:
    require_slots("slots", slots, values.shape[0])
    targets, gates = targets.contiguous(), gates.contiguous()
    steps = slots.shape[1]
    keys, local = _own_slots(slots, values.shape[0]).unique(return_inverse=True)
    # Padded to the size that can be told without looking at the slots: the rows are an output, for the backward.
    rows = values.new_zeros(slots.numel(), values.shape[1])
    working = rows[: keys.numel()]
    torch.index_select(values, 0, keys % values.shape[0], out=working)
    if log_slots is not None and log_coefficients is not None and log_residuals is not None and log_chunks is not None:
        matches = _match(keys, log_slots, log_chunks, values.shape[0])
        to_rows = segment(matches.rows, matches.records)
        add_to_rows_(working, to_rows, matches.weights(log_coefficients), log_residuals.reshape(-1, values.shape[1]))
    out = torch.empty_like(targets)
    tokens = token_of_entry(local[:, 0].flatten(0, 1)) if steps else keys
    for s in range(steps):
        index = local[:, s].flatten(0, 1)
        read = weighted_sum(working, index, weights[:, s].flatten(0, 1))
        out[:, s] = read.view(out[:, s].shape)
        if s + 1 < steps:  # nothing reads the version after the last chunk
            residuals = _residuals(s, targets, gates, out)
            add_to_rows_(working, segment(index.reshape(-1), tokens), coefficients[:, s], residuals)
    return out, rows, local


def _own_slots(slots: Tensor, n_slots: int) -> Tensor:
    """Slots ``[M, ...]`` numbered through all memories."""
    offset = torch.arange(slots.shape[0]) * n_slots
    return slots + offset.view(-1, *(1,) * (slots.dim() - 1))


def _residuals(s: int, targets: Tensor, gates: Tensor, out: Tensor) -> Tensor:
    """``g (y - v-hat)`` of chunk ``s`` in all memories, ``[M * P, Dv]``."""
    return (gates[:, s].unsqueeze(-1) * (targets[:, s] - out[:, s])).flatten(0, 1)


class _Matches(NamedTuple):
    """The log's entries (slot ``j`` of a record) that wrote to a row of the working set, ``E`` of them."""

    entries: Tensor  # [E] into the log's flattened slots
    records: Tensor  # [E] the record of each entry
    rows: Tensor  # [E] the working row it wrote to
    counts: Tensor  # [E] N_s: entries of the same chunk with the same slot

    def weights(self, log_coefficients: Tensor) -> Tensor:
        """The entries' coefficients with the division by ``N_s``."""
        return log_coefficients.flatten()[self.entries] / self.counts


def _match(keys: Tensor, log_slots: Tensor, log_chunks: Tensor, n_slots: int) -> _Matches:
    own = _own_slots(log_slots, n_slots).flatten()
    position = torch.searchsorted(keys, own).clamp_max_(keys.numel() - 1)
    entries = (keys[position] == own).nonzero().squeeze(-1) if keys.numel() else own.new_empty(0)
    rows = position[entries]
    records = entries // log_slots.shape[-1]
    chunks = log_chunks.flatten()[records]
    first, last = chunks.aminmax() if entries.numel() else (chunks.new_zeros(()), chunks.new_zeros(()))
    _, inverse, counts = (rows * (last - first + 1) + chunks - first).unique(return_inverse=True, return_counts=True)
    return _Matches(entries, records, rows, counts[inverse])


def _fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    rows = values.new_empty((slots.numel(), values.shape[1]))
    return targets.new_empty(targets.shape), rows, slots.new_empty(slots.shape)


def _backward_cpu(
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
    n_slots: int,
    values_need_grad: bool,
) -> tuple[Tensor, ...]:
    memories, steps, tokens, fanout = local.shape
    width = out.shape[-1]
    n_rows = int(local.max()) + 1 if local.numel() else 0
    working = rows[:n_rows].clone()  # the version that the last chunk read
    grad_working = torch.zeros_like(working)  # G, of the version after the chunk
    grad_weights, grad_coefficients = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (weights,) * 2
    )
    grad_targets, grad_gates = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (targets, gates))
    entry_tokens = token_of_entry(local[:, 0].flatten(0, 1)) if steps else local
    for s in reversed(range(steps)):
        index = local[:, s].flatten(0, 1)
        entry_rows = index.reshape(-1)
        segments = segment(entry_rows, entry_tokens)
        grad_read = grad_out[:, s].reshape(-1, width)
        if s + 1 < steps:
            residuals = _residuals(s, targets, gates, out)
            grad_residuals = weighted_sum(grad_working, index, coefficients[:, s].flatten(0, 1))
            products = row_products(grad_working, entry_rows, residuals, entry_tokens)
            grad_coefficients[:, s] = products.view(memories, tokens, fanout)
            grad_residuals = grad_residuals.view(memories, tokens, width)
            grad_gates[:, s] = (grad_residuals * (targets[:, s] - out[:, s])).sum(-1)
            grad_targets[:, s] = gates[:, s].unsqueeze(-1) * grad_residuals
            grad_read = grad_read - grad_targets[:, s].flatten(0, 1)  # a read is both an output and in the residual
            # Rewind to the version that this chunk read: its residuals are known, so rounding is all that is lost.
            add_to_rows_(working, segments, -coefficients[:, s], residuals)
        grad_read = grad_read.contiguous()
        products = row_products(working, entry_rows, grad_read, entry_tokens)
        grad_weights[:, s] = products.view(memories, tokens, fanout)
        add_to_rows_(grad_working, segments, weights[:, s], grad_read)

    empty = out.new_empty(0)
    grad_log_coefficients, grad_log_residuals, grad_values = empty, empty.clone(), empty.clone()
    row_keys = torch.empty(n_rows, dtype=torch.int64)
    row_keys[local.flatten()] = _own_slots(slots, n_slots).flatten()
    if log_slots is not None and log_coefficients is not None and log_residuals is not None and log_chunks is not None:
        matches = _match(row_keys, log_slots, log_chunks, n_slots)
        vectors = log_residuals.reshape(-1, width)
        products = row_products(grad_working, matches.rows, vectors, matches.records)
        grad_log_coefficients = out.new_zeros(log_coefficients.shape)
        grad_log_coefficients.view(-1)[matches.entries] = products / matches.counts
        grad_log_residuals = out.new_zeros(log_residuals.shape)
        to_records = segment(matches.records, matches.rows)
        add_to_rows_(grad_log_residuals.view(-1, width), to_records, matches.weights(log_coefficients), grad_working)
    if values_need_grad:
        grad_values = out.new_zeros(n_slots, width).index_add_(0, row_keys % n_slots, grad_working)
    return (
        grad_weights,
        grad_coefficients,
        grad_targets,
        grad_gates,
        grad_log_coefficients,
        grad_log_residuals,
        grad_values,
    )


def _backward_fake(
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
    n_slots: int,
    values_need_grad: bool,
) -> tuple[Tensor, ...]:
    like_inputs = [x.new_empty(x.shape) for x in (weights, coefficients, targets, gates)]
    like_log = [out.new_empty(0 if x is None else x.shape) for x in (log_coefficients, log_residuals)]
    return *like_inputs, *like_log, out.new_empty((n_slots, out.shape[-1]) if values_need_grad else 0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    out, rows, local = output
    ctx.mark_non_differentiable(rows, local)
    values, *others = inputs
    ctx.n_slots = values.shape[0]
    ctx.save_for_backward(out, rows, local, *others)


def _backward(ctx: Any, grad_out: Tensor, _rows: Tensor, _local: Tensor) -> Any:
    values_need_grad = ctx.needs_input_grad[0]
    saved = ctx.saved_tensors  # read once: that is all that activation checkpointing allows
    *inputs, log_coefficients, log_residuals, values = _backward_operator(
        grad_out, *saved, ctx.n_slots, values_need_grad
    )
    if saved[8] is None:  # no log
        log_coefficients = log_residuals = None
    return values if values_need_grad else None, None, *inputs, None, log_coefficients, log_residuals, None


_operator = register(
    "memory_scan(Tensor values, Tensor slots, Tensor weights, Tensor coefficients, Tensor targets, Tensor gates,"
    " Tensor? log_slots, Tensor? log_coefficients, Tensor? log_residuals, Tensor? log_chunks)"
    " -> (Tensor, Tensor, Tensor)",
    _cpu,
    _fake,
)
_backward_operator = register(
    "memory_scan_backward(Tensor grad_out, Tensor out, Tensor rows, Tensor local, Tensor slots, Tensor weights,"
    " Tensor coefficients, Tensor targets, Tensor gates, Tensor? log_slots, Tensor? log_coefficients,"
    " Tensor? log_residuals, Tensor? log_chunks, SymInt n_slots, bool values_need_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
register_backward(_operator, _backward, _setup_context)
refuse_double_backward(_backward_operator)
