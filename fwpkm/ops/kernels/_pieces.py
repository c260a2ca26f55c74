"""How a request's committed records are shared out: in whole chunks, to at most ``PIECES`` programs a token.

The share depends on the request's own records only. So do the order of its sums, and its bits.
"""

import triton
import triton.language as tl

PIECES = 128


@triton.jit
def committed(requests, lengths, origins, token, n_requests, capacity, HAS_ORIGINS: tl.constexpr):
    """Of a token: its request, how many records of it count (0: padding, or nothing), and where chunks count anew."""
    request = tl.load(requests + token).to(tl.int64)
    there = (request >= 0) & (request < n_requests)
    length = tl.load(lengths + token, mask=there, other=0)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    origin = tl.full([], 0, tl.int32)
    if HAS_ORIGINS:
        counted = tl.load(origins + request, mask=there, other=0)
        origin = tl.minimum(tl.maximum(counted, 0), length.to(tl.int64)).to(tl.int32)
    return request, length, origin


@triton.jit
def chunks_of(length, origin, chunk_size):
    """How many chunks ``length`` records are; a boundary stands at ``origin``."""
    return tl.cdiv(origin, chunk_size) + tl.cdiv(length - origin, chunk_size)


@triton.jit
def chunk_bounds(chunk, length, origin, chunk_size):
    """The first record of a chunk, and the one after its last."""
    before = tl.cdiv(origin, chunk_size)
    is_before = chunk < before
    start = tl.where(is_before, chunk * chunk_size, origin + (chunk - before) * chunk_size)
    return start, tl.minimum(start + chunk_size, tl.where(is_before, origin, length))


@triton.jit
def chunks_a_piece(chunks, PIECES: tl.constexpr):
    return tl.maximum(tl.cdiv(chunks, PIECES), 1)
