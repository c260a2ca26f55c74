"""Backward of the key commit, first half: from gradients of coefficients to gradients of ``u``, the pull of the usage.

A program has a tile of rows, one codebook of a token and head each. The gradient of a coefficient is ``-rate`` times
``<q - K, G>`` (``idw``) or ``<q, G>`` (``dot``), with ``G`` the gradient of the new sub-key. That of ``dL/ds = p (u -
sum p u)``, written for the second half, is that times ``2 exp(sub_score)`` (``idw``); that of ``u``, written too, is
``p (g - sum g p)``, to be added up over the selections of a sub-key.

Bytes: ``16 k`` to ``20 k`` a row read and ``8 k`` written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Form
from fwpkm.ops.kernels._usage import load_softmax
from fwpkm.ops.kernels.selected_softmax import tile


@triton.jit(do_not_specialize=["rows", "heads", "k"])
def _kernel(
    grad_gradient,  # [M, P, H, 2, k] float32
    grad_pull,  # [M, P, H, 2, k] float32
    query_products,  # [M, P, H, 2, k] float32: <q, G>
    key_products,  # [T] float32 of idw: <K, G> of all sub-keys; None of dot
    index,  # [M, P, H, 2, k] int64, selected sub-keys out of T; -1: none
    sub_scores,  # [M, P, H, 2, k] float32
    mask,  # [M, P] bool, or None
    rows,  # M * P * H * 2
    heads,  # H
    k,
    rate,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    place, counts, score, p = load_softmax(sub_scores, mask, row, rows, heads, k, BLOCK_R, BLOCK_K)
    g = tl.load(query_products + place, mask=counts, other=0.0)
    if key_products is not None:
        subkey = tl.load(index + place, mask=counts, other=-1)
        g -= tl.load(key_products + subkey, mask=subkey >= 0, other=0.0)
        g *= 2 * tl.exp(score)
    g *= -rate
    tl.store(grad_gradient + place, g, mask=counts)
    tl.store(grad_pull + place, p * (g - tl.sum(g * p, 1)[:, None]), mask=counts)


def commit_usage_gradient(
    grad_gradient: Tensor,
    grad_pull: Tensor,
    query_products: Tensor,
    key_products: Tensor | None,
    index: Tensor,
    sub_scores: Tensor,
    mask: Tensor | None,
    rate: float,
) -> None:
    """Write ``grad_gradient`` and ``grad_pull`` ``[M, P, H, 2, k]``, all float32 and contiguous.

    ``query_products``, ``index`` (int64) and ``sub_scores`` are shaped like them; ``key_products`` of ``idw`` are
    indexed by ``index``; ``mask`` is ``[M, P]`` bool or None.
    """
    heads, k = sub_scores.shape[2], sub_scores.shape[4]
    rows = sub_scores.shape[:-1].numel()
    if rows == 0:
        return
    constants = tile(k)
    _kernel[(triton.cdiv(rows, constants["BLOCK_R"]),)](
        grad_gradient,
        grad_pull,
        query_products,
        key_products,
        index,
        sub_scores,
        mask,
        rows,
        heads,
        k,
        rate,
        **constants,
        num_warps=1,
        num_stages=2,
        **OPTIONS,
    )


def forms() -> list[Form]:
    return [_form("paper", 8), _form("masked", 8, masked=True), _form("wide", 128)]


def _form(name: str, k: int, masked: bool = False) -> Form:
    floats = ("grad_gradient", "grad_pull", "query_products", "key_products", "sub_scores")
    pointers = dict.fromkeys(floats, "*fp32") | {"index": "*i64"} | ({"mask": "*i1"} if masked else {})
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(("rows", "heads", "k"), "i32") | {"rate": "fp32"},
        constants=tile(k) | ({} if masked else {"mask": None}),
        aligned=tuple(pointers),
        num_warps=1,
    )
