"""Softmax of the selected sub-scores of each codebook; zero for tokens that do not count.

A program has a tile of rows, one codebook of a token and head each.

Bytes: ``4 k`` read and ``4 k`` written a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Form, bucket
from fwpkm.ops.kernels._usage import load_softmax


@triton.jit(do_not_specialize=["rows", "heads", "k"])
def _kernel(
    out,  # [M, P, H, 2, k] float32
    sub_scores,  # [M, P, H, 2, k] float32
    mask,  # [M, P] bool, or None
    rows,  # M * P * H * 2
    heads,  # H
    k,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    place, counts, _, probability = load_softmax(sub_scores, mask, row, rows, heads, k, BLOCK_R, BLOCK_K)
    tl.store(out + place, probability, mask=counts)


def selected_softmax(out: Tensor, sub_scores: Tensor, mask: Tensor | None) -> None:
    """Write the softmax of ``sub_scores [M, P, H, 2, k]`` float32 to ``out``; ``mask`` is ``[M, P]`` bool or None.

    All are contiguous.
    """
    heads, k = sub_scores.shape[2], sub_scores.shape[4]
    rows = sub_scores.shape[:-1].numel()
    if rows == 0:
        return
    grid = (triton.cdiv(rows, tile(k)["BLOCK_R"]),)
    _kernel[grid](out, sub_scores, mask, rows, heads, k, **tile(k), num_warps=1, num_stages=2, **OPTIONS)


def tile(k: int) -> dict[str, int]:
    """Rows and places of a tile, for all kernels on such rows."""
    block_k = bucket(k)
    return {"BLOCK_R": max(4, 64 // block_k), "BLOCK_K": block_k}


def forms() -> list[Form]:
    return [_form("paper", 8), _form("masked", 8, masked=True), _form("wide", 128)]


def _form(name: str, k: int, masked: bool = False) -> Form:
    pointers = {"out": "*fp32", "sub_scores": "*fp32"} | ({"mask": "*i1"} if masked else {})
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "heads", "k"), "i32"),
        constants=tile(k) | ({} if masked else {"mask": None}),
        aligned=tuple(pointers),
        num_warps=1,
    )
