"""Every operator on CUDA tensors: the CPU's float64 results, the same bits, one graph, CUDA graphs, large offsets."""

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fwpkm import ops
from tests.draws import Draw, strided
from tests.ops.test_operators import CASES, HALF_CASES, Case, RecordOperators, floating, halved, with_gradient

pytestmark = pytest.mark.gpu
_OWN = {name: make for name, make in (CASES | HALF_CASES).items() if not name.startswith("gated_delta_rule")}
every_operator = pytest.mark.parametrize("make", _OWN.values(), ids=_OWN)  # other operators' kernels are not ours
in_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
TOKENS = 40


def on_gpu(case: Case) -> Case:
    def move(x: Any) -> Any:
        return x.cuda() if isinstance(x, Tensor) else x

    return case._replace(
        floats={k: move(x) for k, x in case.floats.items()}, others={k: move(x) for k, x in case.others.items()}
    )


def results(case: Case) -> list[Tensor]:
    """Outputs, and the gradients of a sum that no two elements enter alike."""
    floats = with_gradient(case)
    outputs = case(*floats)
    return [*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in floating(outputs)), floats)]


@every_operator
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [TOKENS, 1, 0])
def test_results_are_those_of_the_cpu_in_float64(make, seed, tokens):
    case = make(Draw(seed, torch.float32), tokens)
    exact = case._replace(floats={k: x.double() if x.dtype == torch.float32 else x for k, x in case.floats.items()})
    tolerance = rounding(case)
    for have, want in zip(results(on_gpu(case)), results(exact), strict=True):
        assert not have.is_floating_point() or have.dtype == (
            torch.float32 if want.dtype == torch.float64 else want.dtype
        )
        assert_close(have.cpu().to(want.dtype), want, rtol=tolerance, atol=tolerance)


def rounding(case: Case) -> float:
    """What may become of a number near the middle of two in half precision, that is rounded the other way."""
    halves = [torch.finfo(x.dtype).eps for x in case.floats.values() if x.dtype != torch.float32]
    return max([1e-4, *(2 * eps for eps in halves)])


@in_half
@pytest.mark.parametrize("name", ["product_key_address", "key_commit", "product_key_scan"])
def test_a_query_is_as_good_as_converted(name, dtype):
    """Outputs are the same bits; gradients are sums of which the order may differ."""
    case = on_gpu(halved(name, "query", dtype)(Draw(4, torch.float32), TOKENS))
    converted = case._replace(floats={k: x.float() for k, x in case.floats.items()})
    for have, want in zip(case(*case.floats.values()), converted(*converted.floats.values()), strict=True):
        assert have.dtype == want.dtype
        assert torch.equal(have, want)
    for have, want in zip(results(case), results(converted), strict=True):
        eps = torch.finfo(have.dtype).eps if have.dtype == dtype else 1e-5
        assert_close(have.to(want.dtype), want, rtol=eps, atol=eps)


@every_operator
def test_strided_inputs_give_the_same(make):
    case = on_gpu(make(Draw(2, torch.float32), TOKENS))
    spread = case._replace(
        floats={k: strided(x.cpu()).cuda() for k, x in case.floats.items()},
        others={k: strided(x.cpu()).cuda() if isinstance(x, Tensor) else x for k, x in case.others.items()},
    )
    for have, want in zip(results(spread), results(case), strict=True):
        assert_close(have, want)


@every_operator
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(make, requires_grad):
    case, calls = on_gpu(make(Draw(0, torch.float32), TOKENS)), []
    with RecordOperators(calls):
        case(*(x.requires_grad_(requires_grad) for x in case.floats.values()))
    for operator, arguments in calls:
        arguments = tuple(
            a.detach().requires_grad_(requires_grad and a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in arguments
        )
        torch.library.opcheck(operator, arguments)


@every_operator
@pytest.mark.unpoisoned
def test_bitwise_deterministic(make):
    case = on_gpu(make(Draw(3, torch.float32), 700))
    first = results(case)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, results(case), strict=True))


@every_operator
def test_one_graph_for_every_length(make):
    compiled = None
    for tokens in (8, 12, 33):
        case = on_gpu(make(Draw(tokens, torch.float32), tokens))
        compiled = compiled or torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
        for have, want in zip(results(case._replace(function=compiled)), results(case), strict=True):
            assert_close(have, want)


@every_operator
@pytest.mark.unpoisoned
def test_a_cuda_graph_replays_what_eager_does(make):
    """Captured with one set of numbers, replayed with another: nothing on the host depended on them."""
    first, second = (on_gpu(make(Draw(seed, torch.float32), TOKENS)) for seed in (0, 1))
    want = [x.clone() for x in results(second)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = results(first)
    for mine, other in ((first.floats, second.floats), (first.others, second.others)):
        for name, x in mine.items():
            if isinstance(x, Tensor):
                x.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)


@in_half
def test_residuals_are_converted(dtype):
    draw = Draw(5, torch.float32)
    slots, coefficients = draw.integers(8, TOKENS, 4).cuda(), draw.normal(TOKENS, 4).cuda()
    values, residuals = draw.normal(64, 96).cuda(), draw.normal(TOKENS, 96).to(dtype).cuda()
    want = ops.memory_write_(values.clone(), slots, coefficients, residuals.float())
    assert torch.equal(ops.memory_write_(values, slots, coefficients, residuals), want)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("tokens", [1, 500])
def test_a_write_is_that_of_the_cpu_and_the_same_bits(tokens):
    draw = Draw(0, torch.float32)
    values, slots = draw.normal(64, 96), draw.integers(8, tokens, 4)  # hot rows
    coefficients, residuals = draw.normal(tokens, 4) / tokens, draw.normal(tokens, 96)
    want = ops.memory_write_(values.double(), slots, coefficients.double(), residuals.double())
    rest = [x.cuda() for x in (slots, coefficients, residuals)]
    found = [ops.memory_write_(values.cuda(), *rest) for _ in range(5)]
    assert_close(found[0].cpu().double(), want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(found[0], x) for x in found[1:])


@pytest.mark.unpoisoned
def test_offsets_beyond_32_bits():
    """A table of 2^31 numbers and some: its last rows are read, written and scanned."""
    width, rows = 512, (2**31) // 512 + 64
    if torch.cuda.mem_get_info()[0] < 3 * rows * width * 4:
        pytest.skip("needs 26 GB of free GPU memory")
    values = torch.zeros(rows, width, device="cuda")
    last = torch.arange(rows - 8, rows, device="cuda")
    numbers = torch.randn(8, width, device="cuda")
    values[last] = numbers
    slots, weights = last.view(4, 2), torch.rand(4, 2, device="cuda")
    want = (numbers.view(4, 2, width) * weights.unsqueeze(-1)).sum(1)
    assert_close(ops.memory_read(values, slots, weights), want)
    residuals = torch.randn(4, width, device="cuda")
    chunked = (slots.view(1, 2, 2, 2), weights.view(1, 2, 2, 2))
    scan = ops.memory_scan(values, *chunked, chunked[1], residuals.view(1, 2, 2, width), weights[:, 0].view(1, 2, 2))
    assert_close(scan.flatten(0, 2), want)  # the chunks share no slot
    ops.memory_write_(values, slots, weights, residuals)
    assert_close(values[last], numbers + (weights.unsqueeze(-1) * residuals.unsqueeze(1)).flatten(0, 1))
    assert float(values[: rows - 8].abs().sum()) == 0


SHORT = """
import torch
from fwpkm import FastWeights, MemoryConfig, fast_weight_memory
torch.manual_seed(0)
query, target, gate = torch.randn(2, 40, 2, 6), torch.randn(2, 40, 5), torch.rand(2, 40)
weights = FastWeights(torch.randn(2, 2, 7, 3).cuda(), torch.randn(49, 5).cuda())
inputs = [x.cuda().requires_grad_() for x in (query, target, gate)]
result = fast_weight_memory(*inputs, weights, MemoryConfig(topk=3, chunk_size=8))
result.output.sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.unpoisoned
def test_memcheck_finds_nothing():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SHORT]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if "not supported" in found.stdout + found.stderr:
        pytest.skip("compute-sanitizer does not run on this machine")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
