"""Half-precision queries, weights, targets and residuals on kernels: converted when loaded, rounded when stored."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fwpkm import ops
from tests.draws import Draw
from tests.ops.test_half_precision import results, scan_inputs, test_residuals_are_converted  # noqa: F401 (on kernels)
from tests.ops.test_operators import TOPK, Case, P, halved

HALVES = (torch.bfloat16, torch.float16)
in_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")


def of_queries(draw: Draw) -> dict[str, Case]:
    """Small ones: an interpreted program takes its time."""
    query, keys = draw.normal(1, 2, 3, 1, 6), draw.normal(1, 1, 2, 4, 3)
    chunk = query[:, 0]
    _, _, sub_scores, sub_slots = ops.product_key_address(chunk, keys, TOPK)
    commit = {"sub_slots": sub_slots, "mask": torch.tensor([[True, False, True]]), "rate": 0.7}
    scan = {"k": TOPK, "mask": torch.ones(1, 2, 3, dtype=torch.bool), "rate": 0.7}
    return {
        "address": Case(ops.product_key_address, {"query": chunk, "keys": keys}, {"k": TOPK}),
        "commit": Case(ops.key_commit, {"query": chunk, "keys": keys, "sub_scores": sub_scores}, commit),
        "scan": Case(ops.product_key_scan, {"query": query, "keys": keys}, scan),
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("address", torch.bfloat16), ("address", torch.float16), ("commit", torch.float16), ("scan", torch.bfloat16)],
    ids=str,
)
def test_a_query_is_as_good_as_converted(name, dtype):
    """The same bits, and of its gradient those of the converted query's, rounded."""
    case = of_queries(Draw(0, torch.float32))[name]
    half = case.floats["query"].to(dtype)
    have, grads = results(case._replace(floats=case.floats | {"query": half}))
    want, wide_grads = results(case._replace(floats=case.floats | {"query": half.float()}))
    assert grads[0].dtype == dtype
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(grads, wide_grads, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def few_bits(case: Case) -> Case:
    """Numbers whose first sums are exact in float32, and not in half precision: the order of sums does not show."""
    return case._replace(floats={k: (x * 64).round() / 64 for k, x in case.floats.items()})


@in_half
@pytest.mark.parametrize("kind", ["read", "scan"])
def test_as_the_cpu_operator(kind, dtype, monkeypatch):
    """The same bits: what is returned is rounded once, and residuals are those of the rounded reads. The interpreter
    rounds bfloat16 towards zero.
    """
    draw = Draw(4, torch.float32)
    case = few_bits(
        scan_inputs(draw, dtype, memories=2, steps=2)
        if kind == "scan"
        else halved("memory_read", "weights", dtype)(draw, P)
    )
    have, grads = results(case)
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "reference")
    want, wide_grads = results(case)
    for a, b in zip((*have, *grads), (*want, *wide_grads), strict=True):
        assert a.dtype == b.dtype
        tolerance = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 or a.dtype == dtype else 1e-5
        assert_close(a, b, rtol=tolerance, atol=float(tolerance * b.detach().abs().max()))
    if dtype == torch.float16:
        assert torch.equal(have[0], want[0])


@in_half
def test_error_beside_the_same_in_half_precision(dtype):
    """Against float64 at most twice that of reads and residuals taken in half precision."""
    case = scan_inputs(Draw(6, torch.float32), dtype, steps=3)

    def plain(to: torch.dtype) -> Tensor:
        values, weights, coefficients, targets, gates = (x.to(to) for x in case.floats.values())
        outputs = []
        for s in range(targets.shape[1]):
            index = case.others["slots"][0, s]
            outputs.append((weights[0, s].unsqueeze(-1) * values[index]).sum(1))
            residuals = gates[0, s].unsqueeze(-1) * (targets[0, s] - outputs[-1])
            writes = coefficients[0, s].unsqueeze(-1) * residuals.unsqueeze(1)
            values = values.index_add(0, index.flatten(), writes.flatten(0, 1))
        return torch.stack(outputs).unsqueeze(0)

    want = plain(torch.float64)
    have, naive = case(*case.floats.values())[0], plain(dtype)
    assert (have.double() - want).abs().max() <= 2 * (naive.double() - want).abs().max()
