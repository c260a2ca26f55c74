"""Read from pages on a GPU: pieces of each token's log, then their sum and that of the base values."""

from torch import Tensor

from fwpkm.ops.kernels._pieces import PIECES
from fwpkm.ops.kernels.log_pieces import log_pieces
from fwpkm.ops.kernels.log_total import log_total

_SUMS_AT_ONCE = 1 << 24  # numbers, 64 MiB: more tokens take turns


def forward(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    page_slots: Tensor,
    page_coefficients: Tensor,
    page_residuals: Tensor,
    block_table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    chunk_size: int,
    lookahead: int,
    origins: Tensor | None,
) -> Tensor:
    n_slots, width = values.shape
    out = values.new_empty(slots.shape[0], width)
    values, block_table = values.contiguous(), block_table.contiguous()
    by_token = [x.contiguous() for x in (slots, weights, requests, lengths)]
    origins = None if origins is None else origins.contiguous()
    pages = page_slots, page_coefficients, page_residuals
    capacity = block_table.shape[1] * page_slots.shape[1]
    pieces = min(PIECES, -(-capacity // chunk_size) + 1) if capacity else 0  # an origin makes one chunk more
    turn = max(1, _SUMS_AT_ONCE // max(1, pieces * width))
    sums = values.new_empty(min(turn, slots.shape[0]), pieces, width)
    for first in range(0, slots.shape[0], turn):
        reads = out[first : first + turn]
        mine = sums[: reads.shape[0]]
        s, w, r, n = (x[first : first + turn] for x in by_token)
        log_pieces(mine, s, w, pages, block_table, r, n, origins, n_slots, chunk_size, lookahead)
        log_total(reads, mine, values, s, w, r, n, origins, block_table.shape[0], capacity, chunk_size)
    return out
