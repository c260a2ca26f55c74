"""What the kernels of the key commit share: the softmax of a codebook's selection, and the pull of its sub-keys' usage.

A row is one codebook's selection of a token and head, row ``((m P + p) H + h) 2 + c`` of ``[M, P, H, 2, k]``.
"""

import triton
import triton.language as tl

ENTROPY_EPS = tl.constexpr(1e-8)


@triton.jit
def load_softmax(sub_scores, mask, row, rows, heads, k, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Places ``[BLOCK_R, BLOCK_K]`` of the rows' selections, which count, the sub-scores, and their softmax.

    The softmax is 0 where a token is False in ``mask [M, P]`` (or None).
    """
    lane = tl.arange(0, BLOCK_K)[None, :]
    row_counts = row < rows
    counts = row_counts[:, None] & (lane < k)
    place = row[:, None] * k + lane
    score = tl.load(sub_scores + place, mask=counts, other=0.0)
    shifted = score - tl.max(tl.where(lane < k, score, -float("inf")), 1)[:, None]
    exponential = tl.where(lane < k, tl.exp(shifted), 0.0)
    probability = exponential / tl.sum(exponential, 1)[:, None]
    if mask is not None:
        unmasked = tl.load(mask + row // (2 * heads), mask=row_counts, other=0) != 0
        probability = tl.where(unmasked[:, None], probability, 0.0)
    return place, counts, score, probability


@triton.jit
def load_pull(usage, pairs, sub_slots, place, counts, row, rows, per_memory, n):
    """``u`` of the selected sub-keys (DESIGN 2.7), their usage, its places in ``[M, 2, n]``, and the memory's pairs."""
    memory = row // per_memory  # rows of a memory lie together
    pairs_of_row = tl.load(pairs + memory, mask=row < rows, other=1.0)[:, None]
    usage_place = ((memory * 2 + row % 2) * n)[:, None] + tl.load(sub_slots + place, mask=counts, other=0)
    used = tl.load(usage + usage_place, mask=counts, other=0.0)
    pull = (tl.log(used + ENTROPY_EPS) + used / (used + ENTROPY_EPS)) / pairs_of_row
    return pull, used, usage_place, pairs_of_row
