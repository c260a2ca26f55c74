"""The second half of ``segment_sum``: rows whose entries lie in several pieces get the sum of their partial sums.

One program a piece and block of columns: it does nothing unless a row's segment starts in its piece and goes on in the
next, else it adds the partial sums of that segment, piece after piece and ``UNROLL`` loads at once, to the row.

Bytes moved: each partial sum read once, and each such row read and written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form

PIECE = 128  # entries: a row hit by E entries takes E / PIECE partial sums, each of PIECE entries one after the other


@triton.jit(do_not_specialize=["rows", "pieces", "units"])
def _kernel(
    table,  # [R, D]
    targets,  # [E] ascending
    partials,  # [E / PIECE, 2, D] sums of: a segment that goes on from the piece before; one that goes on in the next
    rows,  # R
    pieces,  # E / PIECE, rounded up
    units,  # D / UNIT
    PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0)
    target = tl.load(targets + (own + 1) * PIECE - 1)
    after = tl.load(targets + (own + 1) * PIECE)
    before = tl.load(targets + own * PIECE - 1, mask=own > 0, other=-1)
    starts_here = (own == 0) | (before != target)
    if (target >= 0) & (target < rows) & (target == after) & starts_here:
        width = units * UNIT
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        total = tl.load(partials + (own.to(tl.int64) * 2 + 1) * width + columns, mask=inside, other=0.0)
        piece = own + 1
        more = True
        while more:
            for j in tl.static_range(UNROLL):
                at = piece + j
                mine = tl.load(targets + at * PIECE, mask=at < pieces, other=-1) == target
                place = partials + at.to(tl.int64) * 2 * width + columns
                total += tl.load(place, mask=columns < tl.where(mine, width, 0), other=0.0)
            piece += UNROLL
            more = tl.load(targets + piece * PIECE, mask=piece < pieces, other=-1) == target
        place = table + target.to(tl.int64) * width + columns
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def join_pieces(table: Tensor, targets: Tensor, partials: Tensor) -> None:
    """Add to ``table [R, D]`` the partial sums ``[E / PIECE, 2, D]`` that ``segment_sum`` left of ``targets [E]``."""
    pieces = partials.shape[0]
    columns = Columns.of(table.shape[1])
    _kernel[(pieces - 1, columns.blocks)](
        table,
        targets,
        partials,
        table.shape[0],
        pieces,
        columns.units,
        PIECE=PIECE,
        UNIT=columns.unit,
        UNROLL=_UNROLL,
        BLOCK=columns.block,
        num_warps=columns.num_warps,
        num_stages=2,
        **OPTIONS,
    )


_UNROLL = 8


def forms() -> list[Form]:
    return [_form("paper", 512), _form("odd", 129), _form("wide", 2048)]


def _form(name: str, width: int) -> Form:
    columns = Columns.of(width)
    return Form(
        name=name,
        kernel=_kernel,
        types={
            "table": "*fp32",
            "targets": "*i32",
            "partials": "*fp32",
            "rows": "i32",
            "pieces": "i32",
            "units": "i32",
        },
        constants={"PIECE": PIECE, "UNIT": columns.unit, "UNROLL": _UNROLL, "BLOCK": columns.block},
        aligned=("table", "targets", "partials"),
        num_warps=columns.num_warps,
        wide=width % 16 == 0,
    )
