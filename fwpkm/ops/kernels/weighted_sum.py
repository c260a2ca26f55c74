"""Weighted sums of table rows: ``out[p] = sum_j weights[p, j] * table[index[p, j]]``.

One program a token and block of columns: it loads its rows as tiles of ``UNROLL`` entries, so that the loads of a tile
are under way together, adds them up, times their weights, in float32, and stores the sum in the dtype of ``out``.

Bytes moved: ``P K`` rows of the table read, ``P`` rows of ``out`` written, and ``P K`` indices and weights read.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form, bucket


@triton.jit(do_not_specialize=["rows", "fanout", "units"])
def _kernel(
    out,  # [P, D]
    table,  # [R, D]
    index,  # [P, K]
    weights,  # [P, K]
    rows,  # R
    fanout,  # K
    units,  # D / UNIT
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    width = units * UNIT
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    sums = tl.zeros([UNROLL, BLOCK], tl.float32)
    for first in range(0, fanout, UNROLL):
        entries = first + tl.arange(0, UNROLL)
        row = tl.load(index + token * fanout + entries, mask=entries < fanout, other=-1).to(tl.int64)
        weight = tl.load(weights + token * fanout + entries, mask=entries < fanout, other=0.0).to(tl.float32)
        there = (row >= 0) & (row < rows)
        at = row[:, None] * width + columns[None, :]
        values = tl.load(table + at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += tl.where(there, weight, 0.0)[:, None] * values
    tl.store(out + token * width + columns, tl.sum(sums, 0).to(out.dtype.element_ty), mask=inside)


def weighted_sum(out: Tensor, table: Tensor, index: Tensor, weights: Tensor) -> None:
    """Write the sums of ``table [R, D]`` at ``index [P, K]`` to ``out [P, D]``, all contiguous.

    An index outside ``[0, R)``, such as -1, adds nothing. Table, weights and ``out`` are float32, bfloat16 or float16.
    """
    tokens, fanout = index.shape
    if out.numel() == 0:
        return
    columns = Columns.of(out.shape[1], table.itemsize)
    _kernel[(tokens, columns.blocks)](
        out,
        table,
        index,
        weights,
        table.shape[0],
        fanout,
        columns.units,
        UNIT=columns.unit,
        UNROLL=_unroll(fanout),
        BLOCK=columns.block,
        num_warps=columns.num_warps,
        num_stages=2,
        **OPTIONS,
    )


def _unroll(fanout: int) -> int:
    return min(bucket(fanout), 8)


def forms() -> list[Form]:
    return [
        _form("paper", 512, 8),
        _form("bfloat16", 512, 8, table="*bf16", out="*bf16"),
        _form("bfloat16-weights", 512, 8, out="*bf16", weights="*bf16"),
        _form("odd", 129, 8),
        _form("wide", 2048, 128),
    ]


def _form(name: str, width: int, fanout: int, table: str = "*fp32", out: str = "*fp32", weights: str = "*fp32") -> Form:
    columns = Columns.of(width, 4 if table == "*fp32" else 2)
    return Form(
        name=name,
        kernel=_kernel,
        types={
            "out": out,
            "table": table,
            "index": "*i64",
            "weights": weights,
            "rows": "i32",
            "fanout": "i32",
            "units": "i32",
        },
        constants={"UNIT": columns.unit, "UNROLL": _unroll(fanout), "BLOCK": columns.block},
        aligned=("out", "table", "index", "weights"),
        num_warps=columns.num_warps,
        wide=width % 16 == 0,
    )
