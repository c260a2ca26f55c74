"""What a chunk's writes pass back, in ``memory_scan``: from the gradient ``G`` of the version after the chunk to the
gradients of coefficients, gates, targets and reads.

One program a token goes over the columns: it loads the token's rows of ``G`` at once, and takes from the same registers
their products with the token's residual and their sum, times the coefficients, which is the residual's gradient ``dr``;
then ``d gate = <dr, target - read>``, ``d target = gate dr``, ``d read = d out - gate dr``, since a read is an output
and in the residual too. The residual is stored for the commit that is to be undone.

Bytes moved: ``M P K`` rows of ``G`` read; ``M P`` rows of reads, their gradients and targets read, of residuals and the
gradients of targets and reads written.
"""

import triton
import triton.language as tl
from torch import Tensor

from fwpkm.ops.kernels._forms import OPTIONS, Columns, Form, bucket


@triton.jit(do_not_specialize=["step", "steps", "tokens", "fanout", "units"])
def _kernel(
    grad_coefficients,  # [M P, K] of chunk s
    grad_gates,  # [M, S, P]
    grad_targets,  # [M, S, P, D]
    grad_reads,  # [M P, D] of chunk s
    residuals,  # [M P, D] of chunk s
    table,  # [R, D] G
    index,  # [M P, K] of chunk s
    coefficients,  # [M P, K] of chunk s
    grad_out,  # [M, S, P, D]
    out,  # [M, S, P, D]
    targets,  # [M, S, P, D]
    gates,  # [M, S, P]
    step,  # s
    steps,  # S
    tokens,  # P
    fanout,  # K
    units,  # D / UNIT
    UNIT: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = (token // tokens * steps + step) * tokens + token % tokens
    width = units * UNIT
    entries = tl.arange(0, ENTRIES)
    there = entries < fanout
    row = tl.load(index + token * fanout + entries, mask=there, other=0).to(tl.int64)
    coefficient = tl.load(coefficients + token * fanout + entries, mask=there, other=0.0)
    gate = tl.load(gates + place)
    products = tl.zeros([ENTRIES], tl.float32)
    of_gate = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        at = place * width + columns
        rows = tl.load(
            table + (row[:, None] * width + columns[None, :]), mask=there[:, None] & inside[None, :], other=0.0
        )
        target = tl.load(targets + at, mask=inside, other=0.0).to(tl.float32)
        error = target - tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        residual = (gate * error).to(residuals.dtype.element_ty)
        tl.store(residuals + token * width + columns, residual, mask=inside)
        products += tl.sum(rows * residual.to(tl.float32)[None, :], 1)
        grad_residual = tl.sum(rows * coefficient[:, None], 0)
        of_gate += grad_residual * error
        grad_target = gate * grad_residual
        tl.store(grad_targets + at, grad_target.to(grad_targets.dtype.element_ty), mask=inside)
        grad_read = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32) - grad_target
        tl.store(grad_reads + token * width + columns, grad_read, mask=inside)
    tl.store(grad_coefficients + token * fanout + entries, products, mask=there)
    tl.store(grad_gates + place, tl.sum(of_gate, 0))


def scan_write_backward(
    grad_coefficients: Tensor,
    grad_gates: Tensor,
    grad_targets: Tensor,
    grad_reads: Tensor,
    residuals: Tensor,
    table: Tensor,
    index: Tensor,
    coefficients: Tensor,
    grad_out: Tensor,
    out: Tensor,
    targets: Tensor,
    gates: Tensor,
    step: int,
) -> None:
    """Write the first five of chunk ``step``, from the gradient ``table [R, D]`` of the version after it.

    ``[M P, K]`` and ``[M P, D]`` are the chunk's own, ``[M, S, P, D]`` and ``[M, S, P]`` all chunks'. All are
    contiguous. ``[M, S, P, D]`` are of one floating type, ``residuals`` of any, the others float32 but for the index,
    which is in ``[0, R)``.
    """
    memories, steps, tokens, width = out.shape
    if memories * tokens == 0:
        return
    columns, fanout = _columns(width, index.shape[1]), index.shape[1]
    _kernel[(memories * tokens,)](
        grad_coefficients,
        grad_gates,
        grad_targets,
        grad_reads,
        residuals,
        table,
        index,
        coefficients,
        grad_out,
        out,
        targets,
        gates,
        step,
        steps,
        tokens,
        fanout,
        columns.units,
        UNIT=columns.unit,
        ENTRIES=bucket(fanout),
        BLOCK=columns.block,
        num_warps=columns.num_warps,
        **OPTIONS,
    )


_TILE = 4096  # values of G at once: 32 a thread of four warps


def _columns(width: int, fanout: int) -> Columns:
    entries = bucket(fanout)
    columns = Columns.of(width, most=min(max(_TILE // entries, 32), 1024))
    return columns._replace(num_warps=min(max(entries * columns.block // 1024, 1), 8))


def forms() -> list[Form]:
    return [
        _form("paper", 512, 8),
        _form("bfloat16", 512, 8, residuals="*bf16"),
        _form("bfloat16-targets", 512, 8, targets="*bf16"),
        _form("odd", 129, 8),
        _form("wide", 2048, 128),
    ]


def _form(name: str, width: int, fanout: int, residuals: str = "*fp32", targets: str = "*fp32") -> Form:
    columns = _columns(width, fanout)
    floats = ("grad_coefficients", "grad_gates", "grad_targets", "grad_reads", "residuals", "table")
    inputs = ("coefficients", "grad_out", "out", "targets", "gates")
    sizes = ("step", "steps", "tokens", "fanout", "units")
    types = dict.fromkeys(floats, "*fp32") | {"index": "*i64"} | dict.fromkeys(inputs, "*fp32")
    return Form(
        name=name,
        kernel=_kernel,
        types=types
        | {"residuals": residuals}
        | dict.fromkeys(("grad_targets", "grad_out", "out", "targets"), targets)
        | dict.fromkeys(sizes, "i32"),
        constants={"UNIT": columns.unit, "ENTRIES": bucket(fanout), "BLOCK": columns.block},
        aligned=tuple(types),
        num_warps=columns.num_warps,
        wide=width % 16 == 0,
    )
