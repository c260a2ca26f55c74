"""Scan (DESIGN 2.4 to 2.6, section 5): read and commit chunk after chunk, on the touched rows only."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import (
    require,
    require_dtype,
    require_fast_weight_dtype,
    require_input_dtype,
    require_no_nan,
    require_shape,
    require_slots,
)
from fwpkm.ops._batching import batch_first, fold, in_own_table
from fwpkm.ops._index import IndexedLog, Level, add_indexed_, check_indexed
from fwpkm.ops._library import argument_names, refuse_double_backward, register, register_backward
from fwpkm.ops._log import Log, match
from fwpkm.ops._rows import add_to_rows_, row_products, segment, token_of_entry, weighted_sum


def memory_scan(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    targets: Tensor,
    gates: Tensor,
    log: Log | IndexedLog | None = None,
    sequences: Tensor | None = None,
    cut: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
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
        targets: ``[M, S, P, Dv]``, dtype of ``values``, bfloat16 or float16. Half precision is converted when it is
            loaded.
        gates: ``[M, S, P]``, dtype of ``values``.
        log: the records of earlier chunks, or None. An :class:`IndexedLog` is for the CPU, and outside autograd.
        sequences: ``[M, S, P]`` int64, for memories that start anew on the way: tokens of different numbers share
            nothing, and 0 is the sequence that goes on from ``log``. None: all 0.
        cut: ``[M, S]`` int64, through what no gradient flows: sequences up to this number (-1: none), from reads in
            chunk ``s`` and later to writes before it; from reads in chunk 0, to ``values`` (the log may be cut by the
            caller). None: no cut.
        residual_dtype: what residuals are rounded to when they arise; None or the dtype of ``values``: not rounded.
            Its gradient is that of the identity.

    Returns:
        ``out [M, S, P, Dv]`` in the dtype of ``targets``; everything else is computed in that of ``values``. The
        ``out_s`` of a residual is the one returned, rounded where that is in half precision, so that the backward knows
        what was written and rewinds exactly; the gradient of that rounding is the identity's. Gradients flow to
        ``weights``, ``coefficients``, ``targets`` (in their dtype), ``gates``, the log's coefficients and residuals,
        and, as a dense ``[N, Dv]`` tensor, to ``values`` when they require one.

    Raises:
        ValueError: for a wrong shape or dtype, a slot out of range, or NaN.
    """
    require_shape("values", values, ("N", "Dv"))
    require_fast_weight_dtype("values", values)
    require_shape("slots", slots, ("M", "S", "P", "K"))
    memories, steps, _, fanout = slots.shape
    width = values.shape[1]
    floats: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weights": (weights, slots.shape),
        "coefficients": (coefficients, slots.shape),
        "gates": (gates, slots.shape[:3]),
    }
    integers: dict[str, tuple[Tensor, tuple[int, ...]]] = {"slots": (slots, slots.shape)}
    if sequences is not None:
        integers["sequences"] = sequences, slots.shape[:3]
    if cut is not None:
        integers["cut"] = cut, (memories, steps)
    if isinstance(log, IndexedLog):
        check_indexed(log, memories, values)
    elif log is not None:
        require_shape("log.slots", log.slots, (memories, "R", fanout))
        records = log.slots.shape[1]
        integers["log.slots"] = log.slots, log.slots.shape
        integers["log.chunks"] = log.chunks, (memories, records)
        integers["log.lengths"] = log.lengths, (memories,)
        floats["log.coefficients"] = log.coefficients, log.slots.shape
        require_shape("log.residuals", log.residuals, (memories, records, width))
        require_dtype("log.residuals", log.residuals, values.dtype, torch.bfloat16)
        require(log.lookahead >= 0, "log.lookahead", log.lookahead, "a number of records")
    for name, (tensor, shape) in integers.items():
        require_shape(name, tensor, shape)
        require_dtype(name, tensor, torch.int64)
    for name, (tensor, shape) in floats.items():
        require_shape(name, tensor, shape)
        require_dtype(name, tensor, values.dtype)
    require_shape("targets", targets, (*slots.shape[:3], width))
    require_input_dtype("targets", targets, values.dtype)
    fields = log if isinstance(log, Log) else (None,) * 5 + (0,)
    index: tuple[Any, ...] = (0, None, ())
    if isinstance(log, IndexedLog):
        index = log.n_slots, log.residuals, [x for level in log.levels for x in level]
    inputs = (values, slots, weights, coefficients, targets, gates)
    out, _, _ = _operator(*inputs, *fields, sequences, cut, residual_dtype or values.dtype, *index)
    return out


class _Optional(NamedTuple):
    """The operator's arguments after the first six: the log's fields (or None), and what :func:`memory_scan` says."""

    log_slots: Tensor | None
    log_coefficients: Tensor | None
    log_residuals: Tensor | None
    log_chunks: Tensor | None
    log_lengths: Tensor | None
    lookahead: int
    sequences: Tensor | None
    cut: Tensor | None
    residual_dtype: torch.dtype
    index_slots: int = 0
    index_residuals: Tensor | None = None
    levels: Sequence[Tensor] = ()

    @property
    def log(self) -> Log | None:
        return None if self.log_slots is None else Log(*self[:6])  # type: ignore[arg-type]

    @property
    def indexed(self) -> IndexedLog | None:
        if self.index_residuals is None:
            return None
        fields = len(Level._fields)
        levels = (Level(*self.levels[i : i + fields]) for i in range(0, len(self.levels), fields))
        return IndexedLog(self.index_slots, self.index_residuals, tuple(levels))

    @property
    def n_sequences(self) -> int:
        """How many sequence numbers there may be (it looks at the data)."""
        return 1 if self.sequences is None or not self.sequences.numel() else int(self.sequences.max()) + 1


def _check(
    values: Tensor, slots: Tensor, weights: Tensor, coefficients: Tensor, targets: Tensor, gates: Tensor, *others: Any
) -> None:
    require_slots("slots", slots, values.shape[0])
    for name, tensor in (("weights", weights), ("targets", targets), ("gates", gates)):
        require_no_nan(name, tensor)


def _cpu(
    values: Tensor, slots: Tensor, weights: Tensor, coefficients: Tensor, targets: Tensor, gates: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    optional = _Optional(*others)
    _check(values, slots, weights, coefficients, targets, gates)
    targets, gates = targets.contiguous(), gates.contiguous()
    steps = slots.shape[1]
    keys, local = _row_keys(slots, optional, values.shape[0]).unique(return_inverse=True)
    # Padded to the size that can be told without looking at the slots: the rows are an output, for the backward.
    rows = values.new_empty(slots.numel(), values.shape[1])
    working, _ = rows[: keys.numel()], rows[keys.numel() :].zero_()
    torch.index_select(values, 0, keys % values.shape[0], out=working)
    if optional.log is not None:
        matches = match(keys, optional.log, values.shape[0], optional.n_sequences)
        residuals, carriers = matches.residuals(optional.log, values.dtype)
        weights_of_log = matches.weights(optional.log.coefficients)
        add_to_rows_(working, segment(matches.rows, carriers), weights_of_log, residuals)
    if optional.indexed is not None:
        add_indexed_(working, _indexed_keys(keys, optional, values.shape[0]), optional.indexed)
    out = torch.empty_like(targets)
    tokens = token_of_entry(local[:, 0].flatten(0, 1)) if steps else keys
    for s in range(steps):
        index = local[:, s].flatten(0, 1)
        read = weighted_sum(working, index, weights[:, s].flatten(0, 1))
        out[:, s] = read.view(out[:, s].shape)
        if s + 1 < steps:  # nothing reads the version after the last chunk
            residuals = _residuals(s, targets, gates, out, optional.residual_dtype)
            add_to_rows_(working, segment(index.reshape(-1), tokens), coefficients[:, s], residuals)
    return out, rows, local


def _row_keys(slots: Tensor, optional: _Optional, n_slots: int) -> Tensor:
    """Slots ``[M, S, P, K]`` numbered through all sequences of all memories: what has a working row of its own."""
    n_sequences = optional.n_sequences
    owner = (torch.arange(slots.shape[0], device=slots.device) * n_sequences).view(-1, 1, 1)
    if optional.sequences is not None:
        owner = owner + optional.sequences
    return slots + (owner * n_slots).unsqueeze(-1)


def _indexed_keys(keys: Tensor, optional: _Optional, n_slots: int) -> Tensor:
    """Row numbers of :func:`_row_keys` as an index of the log numbers slots; -1 where its sequence is not read."""
    per_memory = optional.n_sequences * n_slots
    own = keys // per_memory * optional.index_slots + keys % optional.index_slots
    return torch.where(keys % per_memory < n_slots, own, -1)


def _residuals(s: int, targets: Tensor, gates: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """``g (y - v-hat)`` of chunk ``s`` in all memories, ``[M * P, Dv]``."""
    error = targets[:, s].to(gates.dtype) - out[:, s].to(gates.dtype)
    return (gates[:, s].unsqueeze(-1) * error).to(dtype).to(gates.dtype).flatten(0, 1)


def _fake(
    values: Tensor, slots: Tensor, weights: Tensor, coefficients: Tensor, targets: Tensor, gates: Tensor, *others: Any
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
    *others: Any,
) -> tuple[Tensor, ...]:
    *fields, n_slots, values_need_grad = others
    optional = _Optional(*fields)
    memories, steps, tokens, fanout = local.shape
    width, log, n_sequences = out.shape[-1], optional.log, optional.n_sequences
    n_rows = int(local.max()) + 1 if local.numel() else 0
    working = rows[:n_rows].clone()  # the version that the last chunk read
    grad_working = torch.zeros_like(working)  # G, of the version after the chunk
    grad_weights, grad_coefficients = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (weights,) * 2
    )
    grad_targets, grad_gates = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (targets, gates))
    entry_tokens = token_of_entry(local[:, 0].flatten(0, 1)) if steps else local
    row_keys = local.new_empty(n_rows)
    row_keys[local.flatten()] = _row_keys(slots, optional, n_slots).flatten()
    owner = row_keys // n_slots

    def cut(s: int) -> None:
        if optional.cut is not None:
            behind = owner % n_sequences <= optional.cut[owner // n_sequences, s]
            grad_working.masked_fill_(behind.unsqueeze(1), 0)

    for s in reversed(range(steps)):
        index = local[:, s].flatten(0, 1)
        entry_rows = index.reshape(-1)
        segments = segment(entry_rows, entry_tokens)
        grad_read = grad_out[:, s].reshape(-1, width).to(rows.dtype)
        if s + 1 < steps:
            cut(s + 1)
            residuals = _residuals(s, targets, gates, out, optional.residual_dtype)
            grad_residuals = weighted_sum(grad_working, index, coefficients[:, s].flatten(0, 1))
            products = row_products(grad_working, entry_rows, residuals, entry_tokens)
            grad_coefficients[:, s] = products.view(memories, tokens, fanout)
            grad_residuals = grad_residuals.view(memories, tokens, width)
            error = targets[:, s].to(rows.dtype) - out[:, s].to(rows.dtype)
            grad_gates[:, s] = (grad_residuals * error).sum(-1)
            of_targets = gates[:, s].unsqueeze(-1) * grad_residuals
            grad_targets[:, s] = of_targets
            grad_read = grad_read - of_targets.flatten(0, 1)  # a read is both an output and in the residual
            # Rewind to the version that this chunk read: its residuals are known, so rounding is all that is lost.
            add_to_rows_(working, segments, -coefficients[:, s], residuals)
        grad_read = grad_read.contiguous()
        products = row_products(working, entry_rows, grad_read, entry_tokens)
        grad_weights[:, s] = products.view(memories, tokens, fanout)
        add_to_rows_(grad_working, segments, weights[:, s], grad_read)

    empty = rows.new_empty(0)
    grad_log_coefficients, grad_log_residuals, grad_values = empty, empty.clone(), empty.clone()
    if log is not None:
        matches = match(row_keys, log, n_slots, n_sequences)
        table, carriers = matches.residuals(log, rows.dtype)
        products = row_products(grad_working, matches.rows, table, carriers)
        grad_log_coefficients = rows.new_zeros(log.coefficients.shape)
        grad_log_coefficients.view(-1)[matches.entries] = products / matches.counts
        grad_table = rows.new_zeros(log.residuals.shape)
        to_records = segment(matches.carriers, matches.rows)
        add_to_rows_(grad_table.view(-1, width), to_records, matches.weights(log.coefficients), grad_working)
        grad_log_residuals = grad_table.to(log.residuals.dtype)
    if values_need_grad:
        if steps:
            cut(0)
        grad_values = rows.new_zeros(n_slots, width).index_add_(0, row_keys % n_slots, grad_working)
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
    *others: Any,
) -> tuple[Tensor, ...]:
    *fields, n_slots, values_need_grad = others
    optional = _Optional(*fields)
    like_inputs = [x.new_empty(x.shape) for x in (weights, coefficients, targets, gates)]
    log_floats = (optional.log_coefficients, optional.log_residuals)
    like_log = [rows.new_empty(0) if x is None else x.new_empty(x.shape) for x in log_floats]
    return *like_inputs, *like_log, rows.new_empty((n_slots, out.shape[-1]) if values_need_grad else 0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    out, rows, local = output
    ctx.mark_non_differentiable(rows, local)
    values, *others = inputs
    optional = _Optional(*others[5:])
    ctx.n_levels = len(optional.levels)
    ctx.n_slots, ctx.lookahead, ctx.residual_dtype = values.shape[0], optional.lookahead, optional.residual_dtype
    # what no gradient is wanted for is not looked at again
    log = optional[:5] if ctx.needs_input_grad[7] or ctx.needs_input_grad[8] else (None,) * 5
    ctx.save_for_backward(out, rows, local, *others[:5], *log, optional.sequences, optional.cut)


def _backward(ctx: Any, grad_out: Tensor, _rows: Tensor, _local: Tensor) -> Any:
    values_need_grad = ctx.needs_input_grad[0]
    *saved, sequences, cut = ctx.saved_tensors
    *inputs, log_coefficients, log_residuals, values = _backward_operator(
        grad_out, *saved, ctx.lookahead, sequences, cut, ctx.residual_dtype, ctx.n_slots, values_need_grad
    )
    if saved[8] is None:  # no log
        log_coefficients = log_residuals = None
    others = (None,) * 8 + ([None] * ctx.n_levels,)
    return values if values_need_grad else None, None, *inputs, None, log_coefficients, log_residuals, *others


def _fold(operator: Any, info: Any, in_dims: Any, args: Any) -> tuple[dict[str, Any], tuple[int, int]]:
    """The operator's arguments by name, :func:`fold`-ed but for the tensors that are not by memory, ``[M, ...]``."""
    named, dims = (dict(zip(argument_names(operator), x, strict=True)) for x in (args, in_dims))
    by_memory = [name for name in named if name not in ("values", "rows")]
    folded, sizes = fold(info, [dims[name] for name in by_memory], [named[name] for name in by_memory])
    return named | dict(zip(by_memory, folded, strict=True)), sizes


def _in_own_tables(named: dict[str, Any], n_slots: int, sizes: tuple[int, int]) -> dict[str, Any]:
    """The same arguments for samples that have ``n_slots`` rows each."""
    slots = {name: named[name] for name in ("slots", "log_slots") if named[name] is not None}
    return named | {name: in_own_table(x.unflatten(0, sizes), n_slots).flatten(0, 1) for name, x in slots.items()}


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    named, sizes = _fold(_operator, info, in_dims, args)
    if in_dims[0] is not None:
        (values,) = batch_first(info, in_dims[:1], args[:1])
        named = _in_own_tables(named, values.shape[1], sizes) | {"values": values.flatten(0, 1)}
    out, rows, local = _operator(**named)
    return (out.unflatten(0, sizes), *_unfold_rows(rows, local.unflatten(0, sizes))), 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    named, sizes = _fold(_backward_operator, info, in_dims, args)
    (rows,) = batch_first(info, in_dims[2:3], args[2:3])
    rows, local = _fold_rows(rows, named["local"].unflatten(0, sizes))
    n_slots = named["n_slots"]
    named = _in_own_tables(named, n_slots, sizes)  # a sample's gradient of the values is its own even if they are not
    named |= {"rows": rows, "local": local, "n_slots": info.batch_size * n_slots}

    def own(grad: Tensor) -> tuple[Tensor, int | None]:
        if grad.dim() == 1:  # stands for a gradient that is not there
            return grad, None
        return grad.unflatten(0, (info.batch_size, n_slots) if grad.dim() == 2 else sizes), 0

    return tuple(zip(*map(own, _backward_operator(**named)), strict=True))


def _unfold_rows(rows: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Working rows as the operator returns them for each sample, ``[B * R, Dv]`` -> ``[B, R, Dv]``, with ``local``,
    ``[B, M, S, P, K]``. The rows of a sample follow those of the one before it, and padding comes last.
    """
    capacity = local.shape[1:].numel()
    if local.numel() == 0:
        return rows.unflatten(0, (local.shape[0], capacity)), local
    first = local.flatten(1).amin(1)
    position = first.unsqueeze(1) + torch.arange(capacity, device=rows.device)
    return rows[position.clamp_max(rows.shape[0] - 1)], local - first.view(-1, 1, 1, 1, 1)


def _fold_rows(rows: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: ``[B, R, Dv]`` -> ``[B * R, Dv]`` with all padding last, and ``local`` to ``[B * M, S, P, K]``."""
    if local.numel() == 0:
        return rows.flatten(0, 1), local.flatten(0, 1)
    counts = local.flatten(1).amax(1) + 1
    padding = torch.arange(rows.shape[1], device=rows.device) >= counts.unsqueeze(1)
    first = counts.cumsum(0) - counts
    rows = rows.flatten(0, 1)[padding.flatten().argsort(stable=True)]
    return rows, (local + first.view(-1, 1, 1, 1, 1)).flatten(0, 1)


def _entries(slots: Sequence[int], log_slots: Sequence[int] | None) -> tuple[int, int, int]:
    """How many rows are read, are written (the last chunk's writes are never made), and are in the log: all of it
    counts, since how much matches is not known from sizes.
    """
    memories, steps, tokens, fanout = slots
    chunk = memories * tokens * fanout
    return steps * chunk, max(steps - 1, 0) * chunk, 0 if log_slots is None else prod(log_slots)


def _flops(values: Sequence[int], slots: Sequence[int], log_slots: Sequence[int] | None, **_: Any) -> int:
    return 2 * values[1] * sum(_entries(slots, log_slots))


def _backward_flops(out: Sequence[int], slots: Sequence[int], log_slots: Sequence[int] | None, **_: Any) -> int:
    """To weights and rows of a read and of a log entry; of a write to coefficients and residuals, and undoing it."""
    reads, writes, logged = _entries(slots, log_slots)
    return 2 * out[-1] * (2 * reads + 3 * writes + 2 * logged)


_OPTIONAL = (
    "Tensor? log_slots, Tensor? log_coefficients, Tensor? log_residuals, Tensor? log_chunks, Tensor? log_lengths,"
    " int lookahead, Tensor? sequences, Tensor? cut, ScalarType residual_dtype"
)
_operator = register(
    "memory_scan(Tensor values, Tensor slots, Tensor weights, Tensor coefficients, Tensor targets, Tensor gates,"
    f" {_OPTIONAL}, int index_slots, Tensor? index_residuals, Tensor[] levels) -> (Tensor, Tensor, Tensor)",
    _cpu,
    "fwpkm.ops.cuda.memory_scan:forward",
    _fake,
    _flops,
    _check,
)
_backward_operator = register(
    "memory_scan_backward(Tensor grad_out, Tensor out, Tensor rows, Tensor local, Tensor slots, Tensor weights,"
    f" Tensor coefficients, Tensor targets, Tensor gates, {_OPTIONAL}, SymInt n_slots, bool values_need_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_cpu,
    "fwpkm.ops.cuda.memory_scan:backward",
    _backward_fake,
    _backward_flops,
)
register_backward(_operator, _backward, _setup_context, _vmap)
refuse_double_backward(_backward_operator, _backward_vmap)
