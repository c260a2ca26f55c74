"""Read of a server's requests (DESIGN 2.4, section 3): base values plus write logs in pages of a shared cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, Never

import torch
from torch import Tensor

from fwpkm.checks import require, require_dtype, require_fast_weight_dtype, require_no_nan, require_shape, require_slots
from fwpkm.ops._library import register, register_backward
from fwpkm.ops._rows import add_to_rows_, segment, weighted_sum

_MATCHED_AT_ONCE = 1 << 19  # entries of the log; a few numbers of 8 bytes each
_GATHERED_AT_ONCE = 1 << 13  # residuals
_PIECE = 256  # entries of a row that are added up by themselves


class PagedLog(NamedTuple):
    """Records in pages, ``page`` tokens each, of any request; views of one buffer in which a record's fields are
    neighbours. The last dimension is contiguous, the others have any strides; no field is ever copied whole.
    """

    slots: Tensor  # [blocks, page, K] int32 or int64; -1: a read that does not exist
    coefficients: Tensor  # [blocks, page, K], before the division by N_s
    residuals: Tensor  # [blocks, page, Dv], dtype of the values or bfloat16


def log_read(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    pages: PagedLog,
    block_table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    chunk_size: int,
    lookahead: int = 1,
    origins: Tensor | None = None,
) -> Tensor:
    """``sum_j weights[t, j] * V[slots[t, j]]``, where ``V`` is the base plus what the token's request has committed.

    Record ``u`` of request ``r`` is ``pages[block_table[r, u // page], u % page]``. It writes ``coefficients / N_s``
    times the residual of the record ``lookahead`` later, if that one is in the same chunk and committed too; ``N_s`` is
    how often the committed records of its chunk read the slot (paper, equations 6 and 13 to 15; as in
    :class:`fwpkm.ops.Log`). What a token gets is bitwise the same whatever else is in the batch.

    Args:
        values: ``[N, Dv]``, the base, float32 (float64 for numerical checks). Never changed.
        slots: ``[T, K]`` int64 in ``[0, N)``, of the tokens of all requests.
        weights: ``[T, K]``, dtype of ``values``.
        pages: records, of which only committed ones are used; others may hold anything.
        block_table: ``[R, max_blocks]`` int32 or int64. What ``lengths`` does not reach may hold anything.
        requests: ``[T]`` int32 or int64, the request of each token; below 0: padding, whose output is 0 and whose other
            arguments may hold anything.
        lengths: ``[T]`` int64, how many records of its request are committed for the token. They end with a chunk; one
            that they cut is taken for one of that many records.
        chunk_size: records a chunk.
        lookahead: in records.
        origins: ``[R]`` int64, the record of each request from which on chunks are counted anew (an early commit ended
            the one before); None or 0: from the first.

    Returns:
        ``[T, Dv]``. It is for inference, has no gradient, and no batching rule either, since it takes any requests.

    Raises:
        ValueError: for a wrong shape, dtype or layout; a slot, request, length or block out of range; NaN in
            ``weights``.
        RuntimeError: for a gradient, or under ``torch.func``.
    """
    require_shape("values", values, ("N", "Dv"))
    require_fast_weight_dtype("values", values)
    require_shape("slots", slots, ("T", "K"))
    require_dtype("slots", slots, torch.int64)
    tokens, fanout = slots.shape
    require_shape("weights", weights, (tokens, fanout))
    require_dtype("weights", weights, values.dtype)
    require_shape("pages.slots", pages.slots, ("blocks", "page", fanout))
    require_dtype("pages.slots", pages.slots, torch.int32, torch.int64)
    blocks, page, _ = pages.slots.shape
    require_shape("pages.coefficients", pages.coefficients, (blocks, page, fanout))
    require_dtype("pages.coefficients", pages.coefficients, values.dtype)
    require_shape("pages.residuals", pages.residuals, (blocks, page, values.shape[1]))
    require_dtype("pages.residuals", pages.residuals, values.dtype, torch.bfloat16)
    for name, field in zip(pages._fields, pages, strict=True):
        contiguous = field.shape[2] <= 1 or field.stride(2) == 1
        require(contiguous, f"pages.{name}.stride()", field.stride(), "a contiguous last dimension")
    require_shape("block_table", block_table, ("R", "max_blocks"))
    require_dtype("block_table", block_table, torch.int32, torch.int64)
    require_shape("requests", requests, (tokens,))
    require_dtype("requests", requests, torch.int32, torch.int64)
    require_shape("lengths", lengths, (tokens,))
    require_dtype("lengths", lengths, torch.int64)
    require(page > 0, "pages.slots.shape[1]", page, "pages of at least one record")
    require(chunk_size > 0, "chunk_size", chunk_size, "a positive number of records")
    require(lookahead >= 0, "lookahead", lookahead, "a number of records")
    if origins is not None:
        require_shape("origins", origins, (block_table.shape[0],))
        require_dtype("origins", origins, torch.int64)
    return _operator(values, slots, weights, *pages, block_table, requests, lengths, chunk_size, lookahead, origins)


def _check(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    page_slots: Tensor,
    page_coefficients: Tensor,
    page_residuals: Tensor,
    block_table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    chunk_size: int,
    lookahead: int,
    origins: Tensor | None,
) -> None:
    own = requests >= 0
    requests, lengths = requests[own], lengths[own]
    require_slots("slots", slots[own], values.shape[0])
    require_no_nan("weights", weights[own])
    blocks, page, _ = page_slots.shape
    _require_between("requests", requests, block_table.shape[0] - 1)
    _require_between("lengths", lengths, block_table.shape[1] * page)
    if origins is not None:
        _require_between("origins", origins[requests], torch.iinfo(torch.int64).max)
    used = _Blocks.of(block_table, *_readers(requests, lengths)[:2], page)
    _require_between("block_table", used.block, blocks - 1)


def _require_between(name: str, x: Tensor, highest: int) -> None:
    if x.numel():
        low, high = (int(bound) for bound in x.aminmax())
        require(low >= 0 and high <= highest, name, f"in [{low}, {high}]", "numbers in [0, {}]", highest)


def _readers(requests: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that read the same records share them: the distinct pairs of a request and a length, and each one's."""
    span = lengths.amax() + 1 if lengths.numel() else 1
    pairs, reader = (requests.long() * span + lengths).unique(return_inverse=True)
    return pairs // span, pairs % span, reader


class _Blocks(NamedTuple):
    """The blocks with the committed records of readers, one reader's after the other's."""

    first: Tensor  # [G] where those of a reader begin
    reader: Tensor  # [B]
    place: Tensor  # [B] in the reader's row of the block table
    block: Tensor  # [B]

    @classmethod
    def of(cls, block_table: Tensor, requests: Tensor, lengths: Tensor, page: int) -> _Blocks:
        """Of readers, each the first ``lengths [G]`` records of one of the ``requests [G]``."""
        counts = (lengths + page - 1) // page
        first = counts.cumsum(0) - counts
        reader = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(counts)
        place = torch.arange(reader.numel(), device=lengths.device) - first[reader]
        return cls(first, reader, place, block_table[requests[reader], place].long())


def _cpu(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    page_slots: Tensor,
    page_coefficients: Tensor,
    page_residuals: Tensor,
    block_table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    chunk_size: int,
    lookahead: int,
    origins: Tensor | None,
) -> Tensor:
    log = page_slots, page_coefficients, page_residuals, block_table, requests, lengths, chunk_size, lookahead, origins
    _check(values, slots, weights, *log)
    out = values.new_zeros(slots.shape[0], values.shape[1])
    own = (requests >= 0).nonzero().squeeze(-1)
    if own.numel() == 0:
        return out
    page, n_slots = page_slots.shape[1], values.shape[0]
    requests, lengths, reader = _readers(requests[own], lengths[own])
    keys, local = (reader.unsqueeze(1) * n_slots + slots[own]).unique(return_inverse=True)
    rows = values.index_select(0, keys % n_slots)

    blocks = _Blocks.of(block_table, requests, lengths, page)
    entries, targets = _match(keys, page_slots, blocks, lengths, n_slots)
    targets, order = targets.sort(stable=True)  # those of a row stay in the order of its reader's records
    entries = entries[order]
    record, position = entries // slots.shape[1], entries % slots.shape[1]
    at, offset = record // page, record % page
    reader = blocks.reader[at]
    record = blocks.place[at] * page + offset
    origin = torch.zeros_like(requests) if origins is None else origins[requests]
    chunk = _chunk(record, origin[reader], chunk_size)
    _, counts = (targets * (block_table.shape[1] * page + 1) + chunk).unique_consecutive(return_counts=True)
    coefficients = page_coefficients[blocks.block[at], offset, position] / counts.repeat_interleave(counts)
    carrier = record + lookahead
    stored = (carrier < lengths[reader]) & (_chunk(carrier, origin[reader], chunk_size) == chunk)
    targets, coefficients, carrier, reader = (x[stored] for x in (targets, coefficients, carrier, reader))
    where = blocks.block[blocks.first[reader] + carrier // page], carrier % page
    _add(rows, targets, coefficients, page_residuals, where)
    out[own] = weighted_sum(rows, local, weights[own])
    return out


def _match(keys: Tensor, page_slots: Tensor, blocks: _Blocks, lengths: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
    """Entries of the readers' blocks ``[B, page, K]``, flattened, that have one of the sorted ``keys`` (slot ``s`` of
    reader ``g`` is ``g * n_slots + s``), and which one; a bounded number of entries at a time.
    """
    _, page, fanout = page_slots.shape
    # Most entries match nothing. The last bits of their slots tell it of all but some 1 in 16.
    last_bits = max(256, 1 << (16 * keys.numel() - 1).bit_length()) - 1
    wanted = torch.zeros(last_bits + 1, dtype=torch.bool, device=keys.device)
    wanted.index_fill_(0, keys % n_slots & last_bits, True)
    entries, targets = [keys.new_empty(0)], [keys.new_empty(0)]
    step = max(1, _MATCHED_AT_ONCE // max(1, page * fanout))
    for first in range(0, blocks.block.numel(), step):
        logged = page_slots.index_select(0, blocks.block[first : first + step]).flatten()
        found = wanted.index_select(0, logged & last_bits).nonzero().squeeze(-1)
        slot, found = logged[found].long(), found + first * page * fanout
        record = found // fanout
        at = record // page
        reader, record = blocks.reader[at], blocks.place[at] * page + record % page
        own = torch.where((slot >= 0) & (slot < n_slots) & (record < lengths[reader]), reader * n_slots + slot, -1)
        position = torch.searchsorted(keys, own).clamp_max_(keys.numel() - 1)
        same = keys[position] == own
        entries.append(found[same])
        targets.append(position[same])
    return torch.cat(entries), torch.cat(targets)


def _chunk(record: Tensor, origin: Tensor, chunk_size: int) -> Tensor:
    """The number of a record's chunk: a boundary stands at the origin."""
    before = (origin + chunk_size - 1) // chunk_size
    return torch.where(record < origin, record // chunk_size, before + (record - origin) // chunk_size)


def _add(rows: Tensor, targets: Tensor, coefficients: Tensor, residuals: Tensor, where: tuple[Tensor, Tensor]) -> None:
    """Add to ``rows[targets[e]]`` (ascending) the residuals, times coefficients; a bounded number at a time.

    A row's entries are cut into pieces, which are added up and then added: what depends on the row's entries only, so
    that its bits do not depend on other rows.
    """
    if targets.numel() == 0:
        return
    _, counts = targets.unique_consecutive(return_counts=True)
    rank = torch.arange(targets.numel(), device=targets.device)
    rank -= (counts.cumsum(0) - counts).repeat_interleave(counts)
    starts = (rank % _PIECE == 0).nonzero().squeeze(-1)
    piece = (rank % _PIECE == 0).cumsum(0) - 1
    pieces = rows.new_zeros(starts.numel(), rows.shape[1])
    turn = starts // _GATHERED_AT_ONCE
    cuts = starts[turn.diff(prepend=turn.new_full((1,), -1)).nonzero().squeeze(-1)].tolist()
    for first, end in pairwise([*cuts, targets.numel()]):
        gathered = residuals[tuple(x[first:end] for x in where)].to(rows.dtype)
        segments = segment(piece[first:end], torch.arange(end - first, device=targets.device))
        add_to_rows_(pieces, segments, coefficients[first:end], gathered)
    whole = segment(targets[starts], torch.arange(starts.numel(), device=targets.device))
    add_to_rows_(rows, whole, coefficients.new_ones(starts.numel()), pieces)


def _fake(values: Tensor, slots: Tensor, *others: Any) -> Tensor:
    return values.new_empty((slots.shape[0], values.shape[1]))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    return None


def _refuse_gradient(ctx: Any, *grads: Any) -> Never:
    raise RuntimeError("log_read is for inference: it has no gradient")


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> Never:
    raise RuntimeError("log_read has no batching rule: it takes tokens of any number of requests")


def _flops(values: Sequence[int], slots: Sequence[int], **_: Any) -> int:
    """Of the base values: how much of the log matches is not known from sizes, and little of it does."""
    return 2 * prod(slots) * values[1]


_operator = register(
    "log_read(Tensor values, Tensor slots, Tensor weights, Tensor page_slots, Tensor page_coefficients,"
    " Tensor page_residuals, Tensor block_table, Tensor requests, Tensor lengths, SymInt chunk_size, SymInt lookahead,"
    " Tensor? origins) -> Tensor",
    _cpu,
    "fwpkm.ops.cuda.log_read:forward",
    _fake,
    _flops,
    _check,
)
register_backward(_operator, _refuse_gradient, _setup_context, _refuse_vmap)
