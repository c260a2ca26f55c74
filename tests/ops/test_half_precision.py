"""Queries, weights, targets and residuals in bfloat16 and float16: converted when loaded, computed in the dtype of the
fast weights, rounded once at the end. See also ``HALF_CASES`` in test_operators.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fwpkm import ops, reference
from tests.draws import Draw
from tests.ops.test_operators import CASES, DV, TOPK, Case, N, P, floating, halved, with_gradient

in_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
OF_QUERIES = [name for name in CASES if "product_key_address" in name or "key_commit" in name or "key_scan" in name]


def results(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a sum that no two elements enter alike."""
    floats = with_gradient(case)
    outputs = case(*floats)
    return [*outputs], [*torch.autograd.grad(sum(x.sin().sum() for x in floating(outputs)), floats)]


@in_half
@pytest.mark.parametrize("name", OF_QUERIES)
def test_a_query_is_as_good_as_converted(name, dtype):
    """The same bits, and of its gradient those of the converted query's, rounded."""
    case = halved(name, "query", dtype)(Draw(0, torch.float32), P)
    converted = case._replace(floats={k: x.float() for k, x in case.floats.items()})
    (have, grads), (want, wide_grads) = results(case), results(converted)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert grads[0].dtype == dtype
    for a, b in zip(grads, wide_grads, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@in_half
def test_a_read_is_rounded_once(dtype):
    case = halved("memory_read", "weights", dtype)(Draw(1, torch.float32), P)
    leaves, wide = with_gradient(case), [x.float().requires_grad_() for x in case.floats.values()]
    have, want = case(*leaves)[0], case(*wide)[0]
    assert torch.equal(have, want.to(dtype))
    cotangent = Draw(2).normal(*have.shape).to(dtype)
    grads = torch.autograd.grad(have, leaves, cotangent)
    for a, b, leaf in zip(grads, torch.autograd.grad(want, wide, cotangent.float()), leaves, strict=True):
        assert torch.equal(a, b.to(leaf.dtype))


@in_half
def test_residuals_are_converted(dtype):
    draw = Draw(3, torch.float32)
    values, slots = draw.normal(N, DV), draw.integers(N, P, TOPK)
    coefficients, residuals = draw.normal(P, TOPK), draw.normal(P, DV).to(dtype)
    want = ops.memory_write_(values.clone(), slots, coefficients, residuals.float())
    assert torch.equal(ops.memory_write_(values, slots, coefficients, residuals), want)


def scan_inputs(draw: Draw, dtype: torch.dtype, memories: int = 1, steps: int = 4, tokens: int = 6) -> Case:
    """Of few rows, and so of many hits."""
    shape = (memories, steps, tokens, TOPK)
    floats = {
        "values": draw.normal(N, DV),
        "weights": draw.normal(*shape),
        "coefficients": draw.normal(*shape) * 0.3,
        "targets": draw.normal(*shape[:3], DV).to(dtype),
        "gates": draw.uniform(*shape[:3]),
    }
    return Case(ops.memory_scan, floats, {"slots": draw.integers(5, *shape)})


@in_half
def test_a_scan_writes_what_the_returned_reads_leave(dtype):
    """Chunk by chunk, with the reads that are returned, rounded, in the residuals: the same bits."""
    case = scan_inputs(Draw(4, torch.float32), dtype)
    values, weights, coefficients, targets, gates = case.floats.values()
    slots, (have,) = case.others["slots"], case(*case.floats.values())
    assert have.dtype == dtype
    values = values.clone()
    for s in range(slots.shape[1]):
        out = ops.memory_read(values, slots[0, s], weights[0, s]).to(dtype)
        assert torch.equal(have[0, s], out)
        residuals = gates[0, s].unsqueeze(-1) * (targets[0, s].float() - out.float())
        ops.memory_write_(values, slots[0, s], coefficients[0, s], residuals)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To ``dtype`` and back, with the gradient of the identity."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def plain_scan(
    values: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    targets: Tensor,
    gates: Tensor,
    slots: Tensor,
    to: torch.dtype,
) -> Tensor:
    """A scan of one memory as one would write it, in the dtype of its arguments, with reads rounded ``to`` another."""
    outputs = []
    for s in range(slots.shape[1]):
        index = slots[0, s]
        out = rounded((weights[0, s].unsqueeze(-1) * values[index]).sum(1), to)
        outputs.append(out)
        residuals = gates[0, s].unsqueeze(-1) * (targets[0, s] - out)
        writes = coefficients[0, s].unsqueeze(-1) * residuals.unsqueeze(1)
        values = values.index_add(0, index.flatten(), writes.flatten(0, 1))
    return torch.stack(outputs).unsqueeze(0)


@in_half
@pytest.mark.parametrize("seed", range(3))
def test_the_backward_of_a_scan_knows_what_was_written(dtype, seed):
    """On numbers of few bits only the rounding of reads is inexact: gradients are those of float64 with that rounding,
    but for the rounding of the targets' own.
    """
    case = scan_inputs(Draw(seed, torch.float32), dtype, steps=3)
    case = case._replace(floats={k: (x * 8).round() / 8 for k, x in case.floats.items()})
    leaves, exact = with_gradient(case), [x.double().requires_grad_() for x in case.floats.values()]
    have, want = case(*leaves)[0], plain_scan(*exact, case.others["slots"], to=dtype)
    assert torch.equal(have.double(), want.to(dtype).double())
    cotangent = Draw(seed + 9).normal(*want.shape).to(dtype)
    grads = torch.autograd.grad(have, leaves, cotangent)
    for name, a, b in zip(case.floats, grads, torch.autograd.grad(want, exact, cotangent.double()), strict=True):
        tolerance = torch.finfo(dtype).eps if name == "targets" else 1e-5
        assert_close(
            a.double(), b, rtol=tolerance, atol=float(tolerance * b.abs().max()), msg=lambda m, n=name: f"{n} {m}"
        )


def commit(query: Tensor, keys: Tensor, sub_slots: Tensor) -> Tensor:
    _, _, sub_scores, selected = ops.product_key_address(query, keys, TOPK)
    assert torch.equal(selected, sub_slots)
    return ops.key_commit(query, keys, sub_scores, sub_slots, None, 0.7)


OURS: dict[str, Callable[..., Tensor]] = {
    "address": lambda query, keys, sub_slots: ops.product_key_address(query, keys, TOPK)[2],
    "commit": commit,
    "read": lambda values, weights, slots: ops.memory_read(values, slots, weights),
    "scan": lambda values, *floats_and_slots: ops.memory_scan(values, floats_and_slots[-1], *floats_and_slots[:-1]),
}
BY_FORMULA: dict[str, Callable[..., Tensor]] = {
    "address": lambda query, keys, sub_slots: reference.sub_scores(query, keys).gather(-1, sub_slots),
    "commit": lambda query, keys, sub_slots: reference.key_commit(query, keys, None, sub_slots, None, 0.7, "idw", 1e-3),
    "read": lambda values, weights, slots: reference.memory_read(values, slots, weights),
    "scan": lambda values, *others: reference.memory_scan(values, others[-1], *others[:-1])[0],
}


def arguments(name: str, draw: Draw, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Float inputs, and slots that are given: in half precision others would be selected."""
    if name in ("read", "scan"):
        case = scan_inputs(draw, dtype) if name == "scan" else halved("memory_read", "weights", dtype)(draw, 9)
        return [*case.floats.values()], case.others["slots"]
    query, keys = draw.normal(2, 7, 1, 8).to(dtype), draw.normal(2, 1, 2, 6, 4)
    return [query, keys], ops.product_key_address(query, keys, TOPK)[3]


@in_half
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("seed", range(3))
def test_error_beside_the_same_in_half_precision(dtype, name, seed, monkeypatch):
    """Against float64, of outputs and gradients, at most twice that of the formula computed in half precision."""
    floats, slots = arguments(name, Draw(seed, torch.float32), dtype)

    def run(function: Callable[..., Tensor], *to: torch.dtype) -> list[Tensor]:
        leaves = [x.to(*to or (x.dtype,)).clone().requires_grad_() for x in floats]
        out = function(*leaves, slots)
        return [x.detach().double() for x in (out, *torch.autograd.grad(out.sin().sum(), leaves))]

    have, want = run(OURS[name]), run(BY_FORMULA[name], torch.float64)
    monkeypatch.setattr(reference, "_double", lambda *tensors: list(tensors))
    naive = run(BY_FORMULA[name], dtype)
    for i, (a, b, c) in enumerate(zip(have, want, naive, strict=True)):
        assert (a - b).abs().max() <= 2 * (c - b).abs().max(), "output" if i == 0 else f"gradient {i}"
