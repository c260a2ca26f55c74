"""Keep the best ``k`` of rows of ``n`` given numbers, descending, of equal ones the lower position first.

A program has a tile of rows and merges them block by block into the running best ``k`` of each row.

Bytes: the rows once, and ``12 k`` written a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._best import HIGHEST, LOWEST, empty_best, keep_best, position_of, to_keys, value_of
from fwpkm.ops.kernels._forms import OPTIONS, Form, bucket

_BLOCK_R, _BLOCK_N, _WARPS = 4, 512, 4


@triton.jit(do_not_specialize=["rows", "k"])
def _kernel(
    values,  # [R, k] float32
    positions,  # [R, k] int64
    x,  # [R, n] float32
    rows,  # R
    n,
    k,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_counts = (row < rows)[:, None]
    best = empty_best(k, BLOCK_R, BLOCK_K)
    for first in range(0, n, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        counts = row_counts & (position < n)[None, :]
        found = tl.load(x + row[:, None] * n + position[None, :], mask=counts, other=0.0)
        best = keep_best(best, tl.where(counts, to_keys(found, position[None, :]), LOWEST))
    best = tl.where(best == HIGHEST, LOWEST, best)
    for place in range(k):
        top = tl.max(best, 1)
        best = tl.where(best == top[:, None], LOWEST, best)
        tl.store(values + row * k + place, value_of(top), mask=row < rows)
        tl.store(positions + row * k + place, position_of(top).to(tl.int64), mask=row < rows)


def select_scores(values: Tensor, positions: Tensor, x: Tensor) -> None:
    """Write the best ``k`` of rows ``x [R, n]`` float32 to ``values``, their positions (int64), ``[R, k]``.

    All are contiguous.
    """
    rows, n = x.shape
    k = values.shape[1]
    if rows == 0:
        return
    grid = (triton.cdiv(rows, _BLOCK_R),)
    _kernel[grid](values, positions, x, rows, n, k, **_constants(k), num_warps=_WARPS, num_stages=2, **OPTIONS)


def _constants(k: int) -> dict[str, int]:
    return {"BLOCK_R": _BLOCK_R, "BLOCK_N": _BLOCK_N, "BLOCK_K": bucket(k)}


def forms() -> list[Form]:
    return [_form("paper", 8), _form("wide", 128), _form("odd", 8, even=False)]


def _form(name: str, k: int, even: bool = True) -> Form:
    pointers = {"values": "*fp32", "positions": "*i64", "x": "*fp32"}
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "n", "k"), "i32"),
        constants=_constants(k),
        aligned=(*pointers, "n") if even else tuple(pointers),
        num_warps=_WARPS,
    )
