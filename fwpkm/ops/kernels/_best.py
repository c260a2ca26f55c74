"""How kernels keep the best ``k`` of a row: numbers and their positions in one sortable integer, and a running list.

A key holds the number's bits, made monotone, above the complement of its position: of two keys the larger one has the
larger number, or the same number at the lower position. No two keys of a row are equal, so nothing depends on the order
in which threads look at them. ``-0.0`` is ``0.0``, and NaN is above everything, as in ``torch.topk``.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 63))  # below every key
HIGHEST = tl.constexpr((1 << 63) - 1)  # above every key
_LOW_BITS = tl.constexpr((1 << 31) - 1)
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def to_keys(x, positions):
    """Keys of float32 ``x`` at ``positions`` int32, shapes that broadcast."""
    bits = tl.where(x == 0, 0, x.to(tl.int32, bitcast=True))
    bits = tl.where(x != x, _NAN, bits)
    monotone = bits ^ ((bits >> 31) & _LOW_BITS)
    return (monotone.to(tl.int64) << 32) | (positions ^ _LOW_BITS).to(tl.int64)


@triton.jit
def value_of(keys):
    monotone = (keys >> 32).to(tl.int32)
    return (monotone ^ ((monotone >> 31) & _LOW_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def position_of(keys):
    return (keys.to(tl.int32) & _LOW_BITS) ^ _LOW_BITS


@triton.jit
def empty_best(k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A running list ``[ROWS, BLOCK_K]`` of ``k`` different keys below all others; the rest, ``HIGHEST``, stay."""
    lane = tl.arange(0, BLOCK_K).to(tl.int64)
    return tl.where(lane < k, lane + LOWEST, HIGHEST)[None, :] + tl.zeros([ROWS, BLOCK_K], dtype=tl.int64)


@triton.jit
def keep_best(best, keys):
    """``best`` after the ``keys [ROWS, BLOCK]``: as long as a row has one above its worst, that one takes its place."""
    top = tl.max(keys, 1)
    worst = tl.min(best, 1)
    while tl.max((top > worst).to(tl.int32), 0) > 0:
        better = top > worst
        best = tl.where(better[:, None] & (best == worst[:, None]), top[:, None], best)
        keys = tl.where(keys == top[:, None], LOWEST, keys)
        top = tl.max(keys, 1)
        worst = tl.min(best, 1)
    return best
