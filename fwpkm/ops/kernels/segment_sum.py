"""Sums of sorted entries, added to rows: ``table[targets[e]] += coefficients[e] * vectors[sources[e]]``, in place.

Entries of one target lie side by side, and the sorted list is cut every ``PIECE`` entries too. One program an entry and
block of columns: it does nothing unless its entry is the first of a piece, else it adds up the piece in order. A piece
that is its target's only one is added to the row; the others are left to ``joined_pieces``, which adds them in order.
So the work of a hot row is shared out, the number of rows need not be known, and the same bits come every time.

Bytes moved: ``E`` vectors read, each touched row read and written once, and of each entry target, source and
coefficient; for each cut that falls within a segment two partial sums at most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form
from fwpkm.ops.kernels.joined_pieces import PIECE, join_pieces


@triton.jit(do_not_specialize=["rows", "entries", "units"])
def _kernel(
    table,  # [R, D]
    targets,  # [E] ascending
    sources,  # [E]
    coefficients,  # [E]
    vectors,  # [V, D]
    partials,  # [E / PIECE, 2, D] sums of: a segment that goes on from the piece before; one that goes on in the next
    rows,  # R
    entries,  # E
    units,  # D / UNIT
    PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    target = tl.load(targets + first)
    before = tl.load(targets + first - 1, mask=first > 0, other=-1)
    goes_on_here = (first > 0) & (before == target)
    if (target >= 0) & (target < rows) & ((not goes_on_here) | (first % PIECE == 0)):
        width = units * UNIT
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        piece = first // PIECE
        end = tl.minimum((piece + 1) * PIECE, entries)
        total = tl.zeros([BLOCK], tl.float32)
        entry = first
        more = True
        while more:
            for j in tl.static_range(UNROLL):
                at = entry + j
                mine = tl.load(targets + at, mask=at < end, other=-1) == target
                source = tl.load(sources + at, mask=at < end, other=0).to(tl.int64)
                coefficient = tl.load(coefficients + at, mask=at < end, other=0.0).to(tl.float32)
                inside_row = columns < tl.where(mine, width, 0)
                vector = tl.load(vectors + source * width + columns, mask=inside_row, other=0.0).to(tl.float32)
                total += tl.where(mine, coefficient, 0.0) * vector
            entry += UNROLL
            more = tl.load(targets + entry, mask=entry < end, other=-1) == target
        goes_on_there = tl.load(targets + end, mask=end < entries, other=-1) == target
        if goes_on_here | goes_on_there:
            slot = piece.to(tl.int64) * 2 + tl.where(goes_on_here, 0, 1)
            tl.store(partials + slot * width + columns, total, mask=inside)
        else:
            place = table + target.to(tl.int64) * width + columns
            tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def segment_sum(table: Tensor, targets: Tensor, sources: Tensor, coefficients: Tensor, vectors: Tensor) -> None:
    """Add to ``table [R, D]`` float32, of entries ``[E]`` sorted by target, ``coefficients`` times ``vectors [V, D]``.

    An entry whose target is outside ``[0, R)``, such as -1, adds nothing. Targets and sources are integers; vectors may
    be float32, bfloat16 or float16; all are contiguous.
    """
    entries, width = targets.numel(), table.shape[1]
    if entries == 0 or table.numel() == 0:
        return
    columns = Columns.of(width, vectors.itemsize)
    pieces = -(-entries // PIECE)
    partials = table.new_empty((pieces if pieces > 1 else 0, 2, width), dtype=torch.float32)
    _kernel[(entries, columns.blocks)](
        table,
        targets,
        sources,
        coefficients,
        vectors,
        partials,
        table.shape[0],
        entries,
        columns.units,
        PIECE=PIECE,
        UNIT=columns.unit,
        UNROLL=_UNROLL,
        BLOCK=columns.block,
        num_warps=columns.num_warps,
        num_stages=2,
        **OPTIONS,
    )
    if pieces > 1:
        join_pieces(table, targets, partials)


_UNROLL = 4


def forms() -> list[Form]:
    return [_form("paper", 512), _form("bfloat16", 512, "*bf16"), _form("odd", 129), _form("wide", 2048)]


def _form(name: str, width: int, vectors: str = "*fp32") -> Form:
    columns = Columns.of(width, 4 if vectors == "*fp32" else 2)
    return Form(
        name=name,
        kernel=_kernel,
        types={
            "table": "*fp32",
            "targets": "*i32",
            "sources": "*i64",
            "coefficients": "*fp32",
            "vectors": vectors,
            "partials": "*fp32",
            "rows": "i32",
            "entries": "i32",
            "units": "i32",
        },
        constants={"PIECE": PIECE, "UNIT": columns.unit, "UNROLL": _UNROLL, "BLOCK": columns.block},
        aligned=("table", "targets", "sources", "coefficients", "vectors", "partials"),
        num_warps=columns.num_warps,
        wide=width % 16 == 0,
    )
