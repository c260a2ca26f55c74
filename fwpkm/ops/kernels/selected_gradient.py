"""Hand the gradients of scores to the sub-scores that they are sums of.

A program has a tile of rows, one half of a token's head each. It goes over the ``k`` slots of the row and adds the
gradient of each to the selected sub-key that is the slot's half. For addresses it adds the gradient that the sub-scores
have themselves, and (``idw``) goes on to the coefficient that sub-keys are multiplied with: ``-2 exp(sub_score)`` times
that, since ``ds/dK = 2 (q - K) / (eps + ||q - K||^2)``.

Bytes: of each token and head ``12 k`` of scores and ``24 k`` to ``40 k`` of sub-scores.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Form, bucket


@triton.jit(do_not_specialize=["rows", "n", "k"])
def _kernel(
    out,  # [R, 2, k] float32
    grad_scores,  # [R, k] float32
    slots,  # [R, k] int64
    sub_slots,  # [R, 2, k] int64
    grad_sub_scores,  # [R, 2, k] float32, or None
    sub_scores,  # [R, 2, k] float32 of idw, or None
    rows,  # 2 * R
    n,
    k,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_counts = row < rows
    scores_row = row // 2 * k
    lane = tl.arange(0, BLOCK_K)
    counts = row_counts[:, None] & (lane < k)[None, :]
    place = row[:, None] * k + lane[None, :]
    subkey = tl.load(sub_slots + place, mask=counts, other=-1).to(tl.int32)
    total = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for j in range(k):
        grad = tl.load(grad_scores + scores_row + j, mask=row_counts, other=0.0)
        slot = tl.load(slots + scores_row + j, mask=row_counts, other=0).to(tl.int32)
        half = tl.where(row % 2 == 0, slot // n, slot % n)
        total += tl.where(subkey == half[:, None], grad[:, None], 0.0)
    if grad_sub_scores is not None:
        total += tl.load(grad_sub_scores + place, mask=counts, other=0.0)
    if sub_scores is not None:
        total *= -2 * tl.exp(tl.load(sub_scores + place, mask=counts, other=0.0))
    tl.store(out + place, total, mask=counts)


def selected_gradient(
    out: Tensor,
    grad_scores: Tensor,
    slots: Tensor,
    sub_slots: Tensor,
    n: int,
    grad_sub_scores: Tensor | None = None,
    idw_sub_scores: Tensor | None = None,
) -> None:
    """Write the gradients of the selected sub-scores, or the coefficients made of them, to ``out [..., 2, k]``.

    ``grad_scores`` and ``slots`` are ``[..., k]``, the others ``[..., 2, k]``; all are contiguous, floats float32.
    """
    rows, k = out.shape[:-1].numel(), out.shape[-1]
    if rows == 0:
        return
    constants = _constants(k)
    _kernel[(triton.cdiv(rows, constants["BLOCK_R"]),)](
        out,
        grad_scores,
        slots,
        sub_slots,
        grad_sub_scores,
        idw_sub_scores,
        rows,
        n,
        k,
        **constants,
        num_warps=1,
        num_stages=2,
        **OPTIONS,
    )


def _constants(k: int) -> dict[str, int]:
    block_k = bucket(k)
    return {"BLOCK_R": max(4, 64 // block_k), "BLOCK_K": block_k}


def forms() -> list[Form]:
    return [_form("paper", 8), _form("wide", 128), _form("topk", 8, address=False)]


def _form(name: str, k: int, address: bool = True) -> Form:
    pointers = {"out": "*fp32", "grad_scores": "*fp32", "slots": "*i64", "sub_slots": "*i64"}
    optional = ("grad_sub_scores", "sub_scores")
    if address:
        pointers |= dict.fromkeys(optional, "*fp32")
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "n", "k"), "i32"),
        constants=_constants(k) | ({} if address else dict.fromkeys(optional)),
        aligned=tuple(pointers),
        num_warps=1,
    )
