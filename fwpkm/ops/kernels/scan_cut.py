"""Set to zero the rows behind a cut: those of the sequences, up to ``cut[m, s]``, through which no gradient flows.

One program ``ROWS`` rows: it looks up which of them are behind the cut, and if any is, writes zeros over those. A row
knows its memory and its sequence; a row of no sequence has the largest number.

Bytes moved: 24 for a row, and the rows behind the cut written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form


@triton.jit(do_not_specialize=["rows", "step", "steps", "units"])
def _kernel(
    table,  # [R, D]
    memories,  # [R]
    sequences,  # [R]
    cut,  # [M, S]
    rows,  # R
    step,  # s
    steps,  # S
    units,  # D / UNIT
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    memory = tl.load(memories + row, mask=there, other=0)
    sequence = tl.load(sequences + row, mask=there, other=0)
    behind = there & (sequence <= tl.load(cut + memory * steps + step))
    if tl.max(behind.to(tl.int32), 0) > 0:
        width = units * UNIT
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            place = table + (row[:, None] * width + columns[None, :])
            tl.store(place, tl.zeros([ROWS, BLOCK], tl.float32), mask=behind[:, None] & inside[None, :])


def scan_cut(table: Tensor, memories: Tensor, sequences: Tensor, cut: Tensor, step: int) -> None:
    """Zero the rows of ``table [R, D]`` float32 whose ``sequences [R]`` are up to ``cut[memories, step]``, ``[M, S]``,
    all contiguous.
    """
    rows, width = table.shape
    if table.numel() == 0:
        return
    columns = Columns.of(width, most=_BLOCK)
    _kernel[(triton.cdiv(rows, _ROWS),)](
        table,
        memories,
        sequences,
        cut,
        rows,
        step,
        cut.shape[1],
        columns.units,
        UNIT=columns.unit,
        ROWS=_ROWS,
        BLOCK=columns.block,
        num_warps=_WARPS,
        **OPTIONS,
    )


_ROWS, _BLOCK, _WARPS = 64, 32, 4


def forms() -> list[Form]:
    return [_form("paper", 512), _form("odd", 129)]


def _form(name: str, width: int) -> Form:
    columns = Columns.of(width, most=_BLOCK)
    pointers = {"table": "*fp32", "memories": "*i64", "sequences": "*i64", "cut": "*i64"}
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "step", "steps", "units"), "i32"),
        constants={"UNIT": columns.unit, "ROWS": _ROWS, "BLOCK": columns.block},
        aligned=tuple(pointers),
        num_warps=_WARPS,
    )
