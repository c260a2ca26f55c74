"""Backward of the key commit, second half: from gradients of ``dL/ds = p (u - sum p u)`` and of ``u`` to sub-scores.

A program has a tile of rows, one codebook of a token and head each. The gradient of a sub-key's ``u``, added up over
its selections, goes on to its mean usage and to every ``p`` of which that is the mean; then through the softmax. For
``idw`` a coefficient is ``exp(sub_score)`` times something, and so has a gradient of its own.

Bytes: ``24 k`` a row, usage and its gradient from the cache among them, and ``4 k`` written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Form
from fwpkm.ops.kernels._usage import ENTROPY_EPS, load_pull, load_softmax
from fwpkm.ops.kernels.selected_softmax import tile


@triton.jit(do_not_specialize=["rows", "per_memory", "heads", "n", "k"])
def _kernel(
    out,  # [M, P, H, 2, k] float32
    grad_gradient,  # [M, P, H, 2, k] float32
    grad_pull,  # [M, 2, n] float32, sums over the selections
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
    place, counts, _, p = load_softmax(sub_scores, mask, row, rows, heads, k, BLOCK_R, BLOCK_K)
    pull, used, usage_place, pairs_of_row = load_pull(usage, pairs, sub_slots, place, counts, row, rows, per_memory, n)
    g = tl.load(grad_gradient + place, mask=counts, other=0.0)
    centred = pull - tl.sum(p * pull, 1)[:, None]
    grad_p = g * centred - tl.sum(g * p, 1)[:, None] * pull
    # u = f(usage) / pairs with f'(x) = 1 / (x + e) + e / (x + e)^2, and usage = sum p / pairs
    shifted = used + ENTROPY_EPS
    slope = (1 + ENTROPY_EPS / shifted) / shifted
    grad_u = tl.load(grad_pull + usage_place, mask=counts, other=0.0)
    grad_p += grad_u * slope / pairs_of_row / pairs_of_row
    grad = p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
    if IDW:
        grad += g * p * centred
    tl.store(out + place, grad, mask=counts)


def commit_score_gradient(
    out: Tensor,
    grad_gradient: Tensor,
    grad_pull: Tensor,
    sub_scores: Tensor,
    sub_slots: Tensor,
    mask: Tensor | None,
    usage: Tensor,
    pairs: Tensor,
    score: str,
) -> None:
    """Write the gradient of ``sub_scores`` to ``out [M, P, H, 2, k]``, all float32 and contiguous.

    ``grad_gradient``, ``sub_scores`` and ``sub_slots`` (int64) are shaped like ``out``; ``grad_pull`` and ``usage`` are
    ``[M, 2, n]``; ``mask [M, P]`` is bool or None; ``pairs`` is ``[M]``.
    """
    memories, tokens, heads, _, k = out.shape
    per_memory = tokens * heads * 2
    rows = memories * per_memory
    if rows == 0:
        return
    constants = tile(k)
    _kernel[(triton.cdiv(rows, constants["BLOCK_R"]),)](
        out,
        grad_gradient,
        grad_pull,
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
    floats = ("out", "grad_gradient", "grad_pull", "sub_scores", "usage", "pairs")
    pointers = dict.fromkeys(floats, "*fp32") | {"sub_slots": "*i64"} | ({"mask": "*i1"} if masked else {})
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "per_memory", "heads", "n", "k"), "i32"),
        constants=tile(k) | {"IDW": True} | ({} if masked else {"mask": None}),
        aligned=tuple(pointers),
        num_warps=1,
    )
