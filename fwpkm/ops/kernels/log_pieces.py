"""What pieces of paged write logs add to tokens' reads: ``sums[t, p] = sum_j weights[t, j] * (V - base)[slots[t, j]]``,
of the records of piece ``p`` of the token's request.

One program a token, piece and block of columns goes over the piece's chunks. It compares ``WALK`` records at a time
with ``AT_ONCE`` of the token's slots, which gives ``N_s`` and the first and the last record that matches; over these,
if any, it goes once more, ``ROWS`` records at a time: each residual counts with one number, the sum over what matched
of weight times coefficient over ``N_s``. Rows that do not count are not loaded. A chunk is in one piece, so no count
needs another program, and a record's slots are read again from the cache.

Bytes moved: of each record its slots, once a token; of those that match coefficients and a residual; ``sums``.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form, bucket
from fwpkm.ops.kernels._pieces import PIECES, chunk_bounds, chunks_a_piece, chunks_of, committed


@triton.jit
def _blocks_of(block_table, request, record, there, max_blocks, n_blocks, PAGE: tl.constexpr):
    """The blocks of a request's records, and which of them there are."""
    block = tl.load(block_table + request * max_blocks + record // PAGE, mask=there, other=-1).to(tl.int64)
    return block, (block >= 0) & (block < n_blocks)


@triton.jit
def _matches(
    page_slots, block_table, request, record, end, wanted, slots_block, slots_record, max_blocks, n_blocks,
    PAGE: tl.constexpr, FANOUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Which slots of the ``record``s before ``end`` are ``wanted``: ``[records, AT_ONCE, BLOCK_K]``."""
    k = tl.arange(0, BLOCK_K)
    block, there = _blocks_of(block_table, request, record, record < end, max_blocks, n_blocks, PAGE)
    place = page_slots + block * slots_block + (record % PAGE).to(tl.int64) * slots_record
    logged = tl.load(place[:, None] + k[None, :], mask=there[:, None] & (k < FANOUT)[None, :], other=-1)
    return logged[:, None, :] == wanted[None, :, None]


@triton.jit(do_not_specialize=["n_slots", "n_requests", "n_blocks", "max_blocks", "units", "lookahead"])
def _kernel(
    sums,  # [T, S, D]; a piece that the token does not have is not written
    slots,  # [T, K]
    weights,  # [T, K]
    page_slots,  # [blocks, page, K]
    page_coefficients,  # [blocks, page, K]
    page_residuals,  # [blocks, page, D]
    block_table,  # [R, max_blocks]
    requests,  # [T]
    lengths,  # [T]
    origins,  # [R]
    slots_block,  # strides, in numbers
    slots_record,
    coefficients_block,
    coefficients_record,
    residuals_block,
    residuals_record,
    n_slots,  # N
    n_requests,  # R
    n_blocks,
    max_blocks,
    units,  # D / UNIT
    chunk_size,
    lookahead,
    HAS_ORIGINS: tl.constexpr,
    PIECES: tl.constexpr,
    PAGE: tl.constexpr,
    FANOUT: tl.constexpr,  # K
    BLOCK_K: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WALK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = units * UNIT
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    capacity = max_blocks.to(tl.int64) * PAGE
    request, length, origin = committed(requests, lengths, origins, token, n_requests, capacity, HAS_ORIGINS)
    n_chunks = chunks_of(length, origin, chunk_size)
    share = chunks_a_piece(n_chunks, PIECES)
    first_chunk = piece * share
    if first_chunk < n_chunks:
        k = tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, FANOUT, AT_ONCE):
            j = first + tl.arange(0, AT_ONCE)
            wanted = tl.load(slots + token * FANOUT + j, mask=j < FANOUT, other=-1)
            is_slot = (wanted >= 0) & (wanted < n_slots)
            weight = tl.load(weights + token * FANOUT + j, mask=is_slot, other=0.0)
            wanted = tl.where(is_slot, wanted, -2).to(page_slots.dtype.element_ty)  # -1 is no slot of a record's
            for chunk in range(first_chunk, tl.minimum(first_chunk + share, n_chunks)):
                start, end = chunk_bounds(chunk, length, origin, chunk_size)
                counts = tl.zeros([WALK, AT_ONCE], tl.int32)
                earliest = tl.zeros([WALK, AT_ONCE], tl.int32) + end
                latest = tl.zeros([WALK, AT_ONCE], tl.int32)
                for at in range(start, end, WALK):
                    record = at + tl.arange(0, WALK)
                    hits = _matches(
                        page_slots, block_table, request, record, end, wanted, slots_block, slots_record, max_blocks,
                        n_blocks, PAGE, FANOUT, BLOCK_K,
                    )  # fmt: skip
                    found = tl.sum(hits.to(tl.int32), 2)
                    counts += found
                    earliest = tl.minimum(earliest, tl.where(found > 0, record[:, None], end))
                    latest = tl.maximum(latest, tl.where(found > 0, record[:, None], 0))
                count = tl.maximum(tl.sum(counts, 0), 1)
                first_hit, last_hit = tl.min(earliest), tl.max(latest)
                # not from the first hit on: a loop that starts at a sum over threads is not given loads of 16 bytes
                for at in range(start, last_hit + 1, ROWS):
                    if at + ROWS > first_hit:
                        record = at + tl.arange(0, ROWS)
                        hits = _matches(
                            page_slots, block_table, request, record, end, wanted, slots_block, slots_record,
                            max_blocks, n_blocks, PAGE, FANOUT, BLOCK_K,
                        )  # fmt: skip
                        hit = tl.sum(hits.to(tl.int32), 1) > 0
                        amount = tl.sum(tl.where(hits, (weight / count)[None, :, None], 0.0), 1)
                        block, _ = _blocks_of(block_table, request, record, record < end, max_blocks, n_blocks, PAGE)
                        place = block * coefficients_block + (record % PAGE).to(tl.int64) * coefficients_record
                        place = page_coefficients + place[:, None] + k[None, :]
                        amount *= tl.load(place, mask=hit, other=0.0)
                        carrier = record + lookahead
                        block, writes = _blocks_of(
                            block_table, request, carrier, carrier < end, max_blocks, n_blocks, PAGE
                        )  # fmt: skip
                        writes &= tl.sum(hit.to(tl.int32), 1) > 0
                        amounts = tl.where(writes, tl.sum(amount, 1), 0.0)
                        place = block * residuals_block + (carrier % PAGE).to(tl.int64) * residuals_record
                        place = page_residuals + place[:, None] + columns[None, :]
                        inside = writes[:, None] & (columns < width)[None, :]
                        residuals = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                        total += tl.sum(amounts[:, None] * residuals, 0)
        place = (token * tl.num_programs(1) + piece) * width + columns
        tl.store(sums + place, total, mask=columns < width)


def log_pieces(
    sums: Tensor,
    slots: Tensor,
    weights: Tensor,
    pages: tuple[Tensor, Tensor, Tensor],
    block_table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    origins: Tensor | None,
    n_slots: int,
    chunk_size: int,
    lookahead: int,
) -> None:
    """Write to ``sums [T, S, D]`` what the pieces, at most ``S``, of each token's request add to its read.

    ``slots`` and ``weights [T, K]``, ``block_table [R, max_blocks]``, ``requests`` and ``lengths [T]`` and ``origins
    [R]`` are contiguous; ``pages`` are slots, coefficients and residuals ``[blocks, page, .]`` of any strides but the
    last, which is 1.
    """
    tokens, pieces, width = sums.shape
    fanout = slots.shape[1]
    if sums.numel() == 0 or fanout == 0:
        sums.zero_()
        return
    blocks, page, _ = pages[0].shape
    block_k, columns = bucket(fanout), Columns.of(width, most=512)
    walk, rows = _steps(block_k, chunk_size)
    _kernel[(tokens, pieces, columns.blocks)](
        sums,
        slots,
        weights,
        *pages,
        block_table,
        requests,
        lengths,
        lengths if origins is None else origins,
        *(stride for x in pages for stride in x.stride()[:2]),
        n_slots,
        block_table.shape[0],
        blocks,
        block_table.shape[1],
        columns.units,
        chunk_size,
        lookahead,
        HAS_ORIGINS=origins is not None,
        PIECES=PIECES,
        PAGE=page,
        FANOUT=fanout,
        BLOCK_K=block_k,
        AT_ONCE=_AT_ONCE,
        WALK=walk,
        ROWS=rows,
        UNIT=columns.unit,
        BLOCK=columns.block,
        num_warps=_WARPS,
        num_stages=2,
        **OPTIONS,
    )


_AT_ONCE = 8
_WARPS = 4


def _steps(block_k: int, chunk_size: int) -> tuple[int, int]:
    """Records of a step that counts, and of one that adds: no more than a chunk has, nor comparisons than fit."""
    walk = min(max(4096 // (block_k * _AT_ONCE), 4), bucket(chunk_size))
    return walk, min(walk, 16)


def forms() -> list[Form]:
    return [
        _form("paper", 512, 8),
        _form("bfloat16", 512, 8, residuals="*bf16"),
        _form("odd", 129, 8),
        _form("wide", 2048, 128),
    ]


def _form(name: str, width: int, fanout: int, residuals: str = "*fp32") -> Form:
    block_k = bucket(fanout)
    walk, rows = _steps(block_k, 512)
    columns = Columns.of(width, most=512)
    strides = [f"{field}_{step}" for field in ("slots", "coefficients", "residuals") for step in ("block", "record")]
    pointers = {
        "sums": "*fp32",
        "slots": "*i64",
        "weights": "*fp32",
        "page_slots": "*i32",
        "page_coefficients": "*fp32",
        "page_residuals": residuals,
        "block_table": "*i32",
        "requests": "*i32",
        "lengths": "*i64",
        "origins": "*i64",
    }
    sizes = ("n_slots", "n_requests", "n_blocks", "max_blocks", "units", "chunk_size", "lookahead")
    is_wide = width % 16 == 0
    return Form(
        name=name,
        kernel=_kernel,
        types=pointers | dict.fromkeys((*strides, *sizes), "i32"),
        constants={
            "HAS_ORIGINS": True,
            "PIECES": PIECES,
            "PAGE": 16,
            "FANOUT": fanout,
            "BLOCK_K": block_k,
            "AT_ONCE": _AT_ONCE,
            "WALK": walk,
            "ROWS": rows,
            "UNIT": columns.unit,
            "BLOCK": columns.block,
        },
        aligned=(*pointers, *(strides if is_wide else ()), "chunk_size"),
        num_warps=_WARPS,
        wide=is_wide,
    )
