"""A chunk's reads, and the residuals they leave: the read of ``memory_scan``, with what the commit needs beside it.

One program a token and block of columns: it loads the token's working rows as tiles of ``UNROLL`` entries, so that the
loads of a tile are under way together, adds them up, times their weights, stores the read, and from the same registers
``gate * (target - read)``, of the read as it is stored. Both are rounded by the type they are stored in.

Bytes moved: ``M P K`` working rows read; ``M P`` rows of targets read, of reads and of residuals written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form, bucket


@triton.jit(do_not_specialize=["step", "steps", "tokens", "fanout", "units"])
def _kernel(
    out,  # [M, S, P, D]
    residuals,  # [M P, D] of chunk s; unused without WRITES
    table,  # [R, D] working rows
    index,  # [M P, K] of chunk s
    weights,  # [M P, K] of chunk s
    targets,  # [M, S, P, D]
    gates,  # [M, S, P]
    step,  # s
    steps,  # S
    tokens,  # P
    fanout,  # K
    units,  # D / UNIT
    WRITES: tl.constexpr,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = (token // tokens * steps + step) * tokens + token % tokens
    width = units * UNIT
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    sums = tl.zeros([UNROLL, BLOCK], tl.float32)
    for first in range(0, fanout, UNROLL):
        entries = first + tl.arange(0, UNROLL)
        there = entries < fanout
        row = tl.load(index + token * fanout + entries, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights + token * fanout + entries, mask=there, other=0.0)
        at = row[:, None] * width + columns[None, :]
        rows = tl.load(table + at, mask=there[:, None] & inside[None, :], other=0.0)
        sums += rows * weight[:, None]
    read = tl.sum(sums, 0).to(out.dtype.element_ty)
    tl.store(out + place * width + columns, read, mask=inside)
    if WRITES:
        target = tl.load(targets + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(gates + place) * (target - read.to(tl.float32))
        tl.store(residuals + token * width + columns, residual.to(residuals.dtype.element_ty), mask=inside)


def scan_read(
    out: Tensor,
    residuals: Tensor | None,
    table: Tensor,
    index: Tensor,
    weights: Tensor,
    targets: Tensor,
    gates: Tensor,
    step: int,
) -> None:
    """Write chunk ``step``'s reads of ``table [R, D]`` at ``index [M P, K]`` to ``out[:, step]``, ``[M, S, P, D]``, and
    its residuals to ``residuals [M P, D]``, unless that is None. All are contiguous. ``out`` and ``targets`` are of one
    floating type, residuals of any, the others float32; the index is in ``[0, R)``.
    """
    if out.numel() == 0:
        return
    memories, steps, tokens, width = out.shape
    fanout = index.shape[1]
    columns = Columns.of(width)
    _kernel[(memories * tokens, columns.blocks)](
        out,
        out if residuals is None else residuals,
        table,
        index,
        weights,
        targets,
        gates,
        step,
        steps,
        tokens,
        fanout,
        columns.units,
        WRITES=residuals is not None,
        UNIT=columns.unit,
        UNROLL=_unroll(fanout),
        BLOCK=columns.block,
        num_warps=columns.num_warps,
        **OPTIONS,
    )


def _unroll(fanout: int) -> int:
    return min(bucket(fanout), 8)


def forms() -> list[Form]:
    return [
        _form("paper", 512, 8),
        _form("last", 512, 8, writes=False),
        _form("bfloat16", 512, 8, residuals="*bf16"),
        _form("bfloat16-targets", 512, 8, targets="*bf16"),
        _form("odd", 129, 8),
        _form("wide", 2048, 128),
    ]


def _form(
    name: str, width: int, fanout: int, residuals: str = "*fp32", targets: str = "*fp32", writes: bool = True
) -> Form:
    columns = Columns.of(width)
    return Form(
        name=name,
        kernel=_kernel,
        types={
            "out": targets,
            "residuals": residuals,
            "table": "*fp32",
            "index": "*i64",
            "weights": "*fp32",
            "targets": targets,
            "gates": "*fp32",
            "step": "i32",
            "steps": "i32",
            "tokens": "i32",
            "fanout": "i32",
            "units": "i32",
        },
        constants={"WRITES": writes, "UNIT": columns.unit, "UNROLL": _unroll(fanout), "BLOCK": columns.block},
        aligned=("out", "residuals", "table", "index", "weights", "targets", "gates"),
        num_warps=columns.num_warps,
        wide=width % 16 == 0,
    )
