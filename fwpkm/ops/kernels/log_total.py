"""The second half of a read from pages: the base values' part, and then the pieces of ``log_pieces`` in order.

One program a token and block of columns. Padding tokens get zeros, and nothing of theirs is read.

Bytes moved: ``K`` rows of the values and the token's pieces read, and a row of ``out`` written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form
from fwpkm.ops.kernels._pieces import PIECES, chunks_a_piece, chunks_of, committed


@triton.jit(do_not_specialize=["n_slots", "n_requests", "capacity", "pieces", "fanout", "units", "chunk_size"])
def _kernel(
    out,  # [T, D]
    sums,  # [T, S, D]
    values,  # [N, D]
    slots,  # [T, K]
    weights,  # [T, K]
    requests,  # [T]
    lengths,  # [T]
    origins,  # [R]
    n_slots,  # N
    n_requests,  # R
    capacity,  # the most records that a request can have
    pieces,  # S
    fanout,  # K
    units,  # D / UNIT
    chunk_size,
    HAS_ORIGINS: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    width = units * UNIT
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    request, length, origin = committed(
        requests, lengths, origins, token, n_requests, capacity.to(tl.int64), HAS_ORIGINS
    )  # fmt: skip
    own = tl.where((request >= 0) & (request < n_requests), fanout, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, own, UNROLL):
        for j in tl.static_range(UNROLL):
            entry = first + j
            row = tl.load(slots + token * fanout + entry, mask=entry < fanout, other=-1)
            weight = tl.load(weights + token * fanout + entry, mask=entry < fanout, other=0.0)
            there = (row >= 0) & (row < n_slots)
            inside_row = columns < tl.where(there, width, 0)
            total += tl.where(there, weight, 0.0) * tl.load(values + row * width + columns, mask=inside_row, other=0.0)
    n_chunks = chunks_of(length, origin, chunk_size)
    used = tl.cdiv(n_chunks, chunks_a_piece(n_chunks, PIECES))
    for first in range(0, used, UNROLL):
        for p in tl.static_range(UNROLL):
            inside_sum = columns < tl.where(first + p < used, width, 0)
            place = sums + (token * pieces + first + p) * width + columns
            total += tl.load(place, mask=inside_sum, other=0.0)
    tl.store(out + token * width + columns, total, mask=columns < width)


def log_total(
    out: Tensor,
    sums: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    requests: Tensor,
    lengths: Tensor,
    origins: Tensor | None,
    n_requests: int,
    capacity: int,
    chunk_size: int,
) -> None:
    """Write reads ``out [T, D]`` of ``values [N, D]`` and ``sums [T, S, D]``; the rest as for ``log_pieces``."""
    tokens, width = out.shape
    if out.numel() == 0:
        return
    columns = Columns.of(width)
    _kernel[(tokens, columns.blocks)](
        out,
        sums,
        values,
        slots,
        weights,
        requests,
        lengths,
        lengths if origins is None else origins,
        values.shape[0],
        n_requests,
        capacity,
        sums.shape[1],
        slots.shape[1],
        columns.units,
        chunk_size,
        HAS_ORIGINS=origins is not None,
        PIECES=PIECES,
        UNIT=columns.unit,
        UNROLL=_UNROLL,
        BLOCK=columns.block,
        num_warps=columns.num_warps,
        num_stages=2,
        **OPTIONS,
    )


_UNROLL = 8


def forms() -> list[Form]:
    return [_form("paper", 512), _form("odd", 129), _form("wide", 2048)]


def _form(name: str, width: int) -> Form:
    columns = Columns.of(width)
    pointers = {
        "out": "*fp32",
        "sums": "*fp32",
        "values": "*fp32",
        "slots": "*i64",
        "weights": "*fp32",
        "requests": "*i32",
        "lengths": "*i64",
        "origins": "*i64",
    }
    sizes = ("n_slots", "n_requests", "capacity", "pieces", "fanout", "units", "chunk_size")
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys(sizes, "i32"),
        constants={
            "HAS_ORIGINS": True,
            "PIECES": PIECES,
            "UNIT": columns.unit,
            "UNROLL": _UNROLL,
            "BLOCK": columns.block,
        },
        aligned=tuple(pointers),
        num_warps=columns.num_warps,
        wide=width % 16 == 0,
    )
