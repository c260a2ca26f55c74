"""Products of vectors with table rows: ``out[p, j] = <vectors[sources[p]], table[index[p, j]]>``.

One program a token: ``UNROLL`` rows at a time are multiplied with the token's vector, block of columns by block of
columns, in float32, and each row's sum is taken at the end.

Bytes moved: ``P K`` rows of the table and ``P`` vectors read, ``P K`` indices read and products written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form, bucket


@triton.jit(do_not_specialize=["rows", "fanout", "units"])
def _kernel(
    out,  # [P, K]
    table,  # [R, D]
    index,  # [P, K]
    vectors,  # [V, D]
    sources,  # [P] rows of vectors; unused without HAS_SOURCES, where token p has vector p
    rows,  # R
    fanout,  # K
    units,  # D / UNIT
    HAS_SOURCES: tl.constexpr,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    width = units * UNIT
    source = token
    if HAS_SOURCES:
        source = tl.load(sources + token).to(tl.int64)
    for first in range(0, fanout, UNROLL):
        entries = first + tl.arange(0, UNROLL)
        row = tl.load(index + token * fanout + entries, mask=entries < fanout, other=-1).to(tl.int64)
        there = (row >= 0) & (row < rows)
        products = tl.zeros([UNROLL, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            vector = tl.load(vectors + source * width + columns, mask=inside, other=0.0).to(tl.float32)
            places = row[:, None] * width + columns[None, :]
            values = tl.load(table + places, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
            products += values * vector[None, :]
        sums = tl.where(there, tl.sum(products, 1), 0.0)
        tl.store(out + token * fanout + entries, sums.to(out.dtype.element_ty), mask=entries < fanout)


def row_products(out: Tensor, table: Tensor, index: Tensor, vectors: Tensor, sources: Tensor | None = None) -> None:
    """Write the products of ``table [R, D]`` at ``index [P, K]`` with each token's vector to ``out [P, K]``.

    Token ``p`` has ``vectors[sources[p]]``, or ``vectors[p]`` without ``sources``. All are contiguous; the product with
    a row outside ``[0, R)`` is 0. Table, vectors and ``out`` may be float32, bfloat16 or float16.
    """
    tokens, fanout = index.shape
    if out.numel() == 0:
        return
    columns = Columns.of(table.shape[1], table.itemsize, _BLOCK)
    _kernel[(tokens,)](
        out,
        table,
        index,
        vectors,
        index if sources is None else sources,
        table.shape[0],
        fanout,
        columns.units,
        HAS_SOURCES=sources is not None,
        UNIT=columns.unit,
        UNROLL=_unroll(fanout),
        BLOCK=columns.block,
        num_warps=columns.num_warps,
        num_stages=2,
        **OPTIONS,
    )


_BLOCK = 512


def _unroll(fanout: int) -> int:
    return min(bucket(fanout), 8)


def forms() -> list[Form]:
    return [
        _form("paper", 512, 8),
        _form("bfloat16", 512, 8, table="*bf16", sources=True),
        _form("bfloat16-vectors", 512, 8, vectors="*bf16"),
        _form("odd", 129, 8),
        _form("wide", 2048, 128),
    ]


def _form(
    name: str, width: int, fanout: int, table: str = "*fp32", vectors: str = "*fp32", sources: bool = False
) -> Form:
    columns = Columns.of(width, 4 if table == "*fp32" else 2, _BLOCK)
    return Form(
        name=name,
        kernel=_kernel,
        types={
            "out": "*fp32",
            "table": table,
            "index": "*i64",
            "vectors": vectors,
            "sources": "*i64",
            "rows": "i32",
            "fanout": "i32",
            "units": "i32",
        },
        constants={
            "HAS_SOURCES": sources,
            "UNIT": columns.unit,
            "UNROLL": _unroll(fanout),
            "BLOCK": columns.block,
        },
        aligned=("out", "table", "index", "vectors", "sources"),
        num_warps=columns.num_warps,
        wide=width % 16 == 0,
    )
