"""Score queries against a codebook and keep the best ``k`` sub-keys of each: no sub-score is written but those.

A program has a tile of tokens and one codebook. Block by block of sub-keys it adds up the products of halves of queries
with sub-keys (IEEE float32), ranks by ``2 q.K - ||K||^2`` (``idw``; ``||q||^2`` is the same for all) or ``q.K``
(``dot``), and merges the block into the running best ``k`` of each token.

Bytes: the queries once, a codebook once for each tile of its tokens (from the L2 cache but for the first), and
``12 k`` written a token and codebook.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._best import HIGHEST, LOWEST, empty_best, keep_best, position_of, to_keys, value_of
from fwpkm.ops.kernels._forms import OPTIONS, Form, bucket

_BLOCK_N, _BLOCK_D = 64, 16
_WARPS, _STAGES = 8, 3


@triton.jit(do_not_specialize=["tokens", "heads", "n", "k"])
def _kernel(
    sub_scores,  # [M, P, H, 2, k] float32
    sub_slots,  # [M, P, H, 2, k] int64
    query,  # [M, P, H, 2 * d] float32 or half precision, strides of the first three below
    keys,  # [M, H, 2, n, d] float32, stride of the first below
    tokens,  # P
    heads,  # H
    n,
    d,
    k,
    eps,
    query_stride_m,
    query_stride_p,
    query_stride_h,
    keys_stride_m,
    IDW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_P)
    codebook = (tl.program_id(0) // tiles).to(tl.int64)  # of M * H * 2
    m, h, c = codebook // (2 * heads), codebook // 2 % heads, codebook % 2
    p = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    p_counts = p < tokens
    feature = tl.arange(0, BLOCK_D)

    query += m * query_stride_m + h * query_stride_h + c * d
    query_rows = query + p[:, None] * query_stride_p + feature[None, :]  # [BLOCK_P, BLOCK_D]
    keys += m * keys_stride_m + (h * 2 + c) * n * d

    best = empty_best(k, BLOCK_P, BLOCK_K)
    for first in range(0, n, BLOCK_N):
        subkey = first + tl.arange(0, BLOCK_N)
        subkey_counts = subkey < n
        key_rows = keys + subkey.to(tl.int64)[:, None] * d + feature[None, :]  # [BLOCK_N, BLOCK_D]
        products = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
        norms = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, d, BLOCK_D):
            counts = (start + feature < d)[None, :]
            q = tl.load(query_rows + start, mask=p_counts[:, None] & counts, other=0.0).to(tl.float32)
            key = tl.load(key_rows + start, mask=subkey_counts[:, None] & counts, other=0.0)
            products = tl.dot(q, tl.trans(key), products, input_precision="ieee")
            if IDW:
                norms += tl.sum(key * key, 1)
        if IDW:
            products = 2 * products - norms[None, :]
        ranked = tl.where(subkey_counts[None, :], to_keys(products, subkey[None, :]), LOWEST)
        best = keep_best(best, ranked)

    norms = tl.zeros([BLOCK_P], dtype=tl.float32)
    if IDW:
        for start in range(0, d, BLOCK_D):
            counts = (start + feature < d)[None, :]
            q = tl.load(query_rows + start, mask=p_counts[:, None] & counts, other=0.0).to(tl.float32)
            norms += tl.sum(q * q, 1)
    out = (((m * tokens + p) * heads + h) * 2 + c) * k
    best = tl.where(best == HIGHEST, LOWEST, best)
    for place in range(k):
        top = tl.max(best, 1)
        best = tl.where(best == top[:, None], LOWEST, best)
        score = value_of(top)
        if IDW:
            distance = norms - score
            score = -tl.log(eps + tl.where(distance < 0, 0.0, distance))  # NaN stays NaN
        tl.store(sub_scores + out + place, score, mask=p_counts)
        tl.store(sub_slots + out + place, position_of(top).to(tl.int64), mask=p_counts)


def select_subkeys(sub_scores: Tensor, sub_slots: Tensor, query: Tensor, keys: Tensor, score: str, eps: float) -> None:
    """Write the best sub-keys of ``query [M, P, H, Dk]`` among ``keys [M, H, 2, n, Dk/2]``.

    All are float32, but the query may be bfloat16 or float16. ``sub_scores`` and ``sub_slots`` (int64) are
    ``[M, P, H, 2, k]``, contiguous, best first. Only the last dimension of ``query`` and the last four of ``keys`` need
    to be.
    """
    memories, tokens, heads, width = query.shape
    n, k = keys.shape[3], sub_scores.shape[4]
    constants = _constants(tokens, k, score)
    programs = memories * heads * 2 * triton.cdiv(tokens, constants["BLOCK_P"])
    if programs == 0:
        return
    strides = *query.stride()[:3], keys.stride(0)
    _kernel[(programs,)](
        sub_scores,
        sub_slots,
        query,
        keys,
        tokens,
        heads,
        n,
        width // 2,
        k,
        eps,
        *strides,
        **constants,
        num_warps=_WARPS,
        num_stages=_STAGES,
        **OPTIONS,
    )


def _constants(tokens: int, k: int, score: str) -> dict[str, int | bool]:
    block_p = 16 if tokens <= 16 or k > 64 else 32  # a long list of the best takes registers
    return {"IDW": score == "idw", "BLOCK_P": block_p, "BLOCK_N": _BLOCK_N, "BLOCK_D": _BLOCK_D, "BLOCK_K": bucket(k)}


def forms() -> list[Form]:
    return [
        _form("paper", 2048, 8),
        _form("decode", 1, 8),
        _form("dot", 2048, 32, score="dot"),
        _form("wide", 2048, 128),
        _form("bfloat16", 2048, 8, query="*bf16"),
        _form("odd", 2048, 8, even=False),
    ]


def _form(name: str, tokens: int, k: int, score: str = "idw", even: bool = True, query: str = "*fp32") -> Form:
    pointers = {"sub_scores": "*fp32", "sub_slots": "*i64", "query": query, "keys": "*fp32"}
    sizes = dict.fromkeys(("tokens", "heads", "n", "d", "k"), "i32") | {"eps": "fp32"}
    strides = dict.fromkeys(("query_stride_m", "query_stride_p", "query_stride_h", "keys_stride_m"), "i32")
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | sizes | strides,
        constants=_constants(tokens, k, score),
        aligned=(*pointers, "d", *strides) if even else tuple(pointers),
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
