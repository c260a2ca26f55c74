"""The gradient of the addressing loss by the selected sub-scores, as the coefficients that move sub-keys (DESIGN 2.7).

A program has a tile of rows, one codebook of a token and head each. From the sub-keys' mean usage it computes the pull
``u`` of those selected, and ``p (u - sum p u)``; for ``idw`` times ``2 exp(sub_score)``, the coefficient of ``q - K``.

Bytes: ``20 k`` a row read, usage from the cache among them, and ``4 k`` written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Form
from fwpkm.ops.kernels._usage import load_pull, load_softmax
from fwpkm.ops.kernels.selected_softmax import tile


@triton.jit(do_not_specialize=["rows", "per_memory", "heads", "n", "k"])
def _kernel(
    out,  # [M, P, H, 2, k] float32
    sub_scores,  # [M, P, H, 2, k] float32
    sub_slots,  # [M, P, H, 2, k] int64
    mask,  # [M, P] bool, or None
    usage,  # [M, 2, n] float32, the mean over pairs
    pairs,  # [M] float32, (token, head) pairs that count
    rows,  # M * P * H * 2
    per_memory,  # P * H * 2
    heads,  # H
    n,
    k,
    IDW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    place, counts, score, p = load_softmax(sub_scores, mask, row, rows, heads, k, BLOCK_R, BLOCK_K)
    pull, _, _, _ = load_pull(usage, pairs, sub_slots, place, counts, row, rows, per_memory, n)
    gradient = p * (pull - tl.sum(p * pull, 1)[:, None])
    if IDW:
        gradient *= 2 * tl.exp(score)
    tl.store(out + place, gradient, mask=counts)


def commit_coefficients(
    out: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    mask: Tensor | None,
    usage: Tensor,
    pairs: Tensor,
    score: str,
) -> None:
    """Write the coefficients of the selected sub-keys to ``out [M, P, H, 2, k]``, all float32 and contiguous.

    ``sub_scores`` and ``sub_slots`` (int64) are shaped like ``out``; ``mask [M, P]`` is bool or None; ``usage`` is
    ``[M, 2, n]``, ``pairs [M]``.
    """
    memories, tokens, heads, _, k = out.shape
    per_memory = tokens * heads * 2
    rows = memories * per_memory
    if rows == 0:
        return
    constants = tile(k)
    _kernel[(triton.cdiv(rows, constants["BLOCK_R"]),)](
        out,
        sub_scores,
        sub_slots,
        mask,
        usage,
        pairs,
        rows,
        per_memory,
        heads,
        usage.shape[2],
        k,
        IDW=score == "idw",
        **constants,
        num_warps=1,
        num_stages=2,
        **OPTIONS,
    )


def forms() -> list[Form]:
    return [_form("paper", 8), _form("masked", 8, masked=True), _form("wide", 128)]


def _form(name: str, k: int, masked: bool = False) -> Form:
    pointers = {"out": "*fp32", "sub_scores": "*fp32", "sub_slots": "*i64", "usage": "*fp32", "pairs": "*fp32"}
    pointers |= {"mask": "*i1"} if masked else {}
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "per_memory", "heads", "n", "k"), "i32"),
        constants=tile(k) | {"IDW": True} | ({} if masked else {"mask": None}),
        aligned=tuple(pointers),
        num_warps=1,
    )
