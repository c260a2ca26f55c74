"""Combine two descending lists of ``k`` sub-scores into the ``k`` best of their ``k x k`` sums.

The sums of rank ``i`` of the first list fall as the rank ``j`` in the second rises: a merge of ``k`` falling lists, of
which only the heads compete. ``k`` times a row's best head is written, and the next sum of its list takes its place;
of equal heads the lower ``i`` wins, which is the lower row-major position in the grid.

Bytes: ``24 k`` read and ``12 k`` written a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._best import LOWEST, position_of, to_keys, value_of
from fwpkm.ops.kernels._forms import OPTIONS, Form, bucket


@triton.jit(do_not_specialize=["rows", "n", "k"])
def _kernel(
    scores,  # [R, k] float32
    slots,  # [R, k] int64
    sub_scores,  # [R, 2, k] float32, descending
    sub_slots,  # [R, 2, k] int64
    rows,  # R
    n,
    k,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_counts = row < rows
    rank = tl.arange(0, BLOCK_K)[None, :]
    counts = row_counts[:, None] & (rank < k)
    first_half, second_half = row * (2 * k), row * (2 * k) + k  # where the lists of a row begin
    first = tl.load(sub_scores + first_half[:, None] + rank, mask=counts, other=0.0)
    best_second = tl.load(sub_scores + second_half, mask=row_counts, other=0.0)
    heads = tl.where(counts, to_keys(first + best_second[:, None], rank), LOWEST)
    partner = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.int32)  # rank in the second list of each head
    for place in range(k):
        top = tl.max(heads, 1)
        i = position_of(top)
        chosen = rank == i[:, None]
        j = tl.sum(tl.where(chosen, partner, 0), 1)
        tl.store(scores + row * k + place, value_of(top), mask=row_counts)
        slot = tl.load(sub_slots + first_half + i, mask=row_counts, other=0) * n
        slot += tl.load(sub_slots + second_half + j, mask=row_counts, other=0)
        tl.store(slots + row * k + place, slot, mask=row_counts)
        more = row_counts & (j + 1 < k)  # a list ends with the last place at the earliest
        following = tl.load(sub_scores + second_half + j + 1, mask=more, other=0.0)
        heads = tl.where(chosen, to_keys(first + following[:, None], rank), heads)
        partner = tl.where(chosen, partner + 1, partner)


def combine_halves(scores: Tensor, slots: Tensor, sub_scores: Tensor, sub_slots: Tensor, n: int) -> None:
    """Write the best sums of ``sub_scores [R, 2, k]`` float32 and their slots (int64) to ``scores``, ``slots [R, k]``.

    ``sub_slots`` are those of ``sub_scores``, out of ``n`` a half. All are contiguous.
    """
    rows, k = scores.shape
    if rows == 0:
        return
    constants = _constants(k)
    grid = (triton.cdiv(rows, constants["BLOCK_R"]),)
    sizes = rows, n, k
    _kernel[grid](scores, slots, sub_scores, sub_slots, *sizes, **constants, num_warps=1, num_stages=2, **OPTIONS)


def _constants(k: int) -> dict[str, int]:
    block_k = bucket(k)
    return {"BLOCK_R": max(4, 128 // block_k), "BLOCK_K": block_k}


def forms() -> list[Form]:
    return [_form("paper", 8), _form("k32", 32), _form("wide", 128)]


def _form(name: str, k: int) -> Form:
    pointers = {"scores": "*fp32", "slots": "*i64", "sub_scores": "*fp32", "sub_slots": "*i64"}
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "n", "k"), "i32"),
        constants=_constants(k),
        aligned=tuple(pointers),
        num_warps=1,
    )
