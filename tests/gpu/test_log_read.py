"""``log_read`` on CUDA tensors: what the plain loop reads, the same bits whatever the batch, graphs, large offsets."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fwpkm import ops
from fwpkm.ops import PagedLog
from tests.ops.test_log_read import alone, as_operator, draw
from tests.paged import Requests, plain_read

pytestmark = pytest.mark.gpu
SIZES = [
    {"lengths": [9, 0, 5], "tokens": 5},
    {"lengths": [700, 40], "tokens": 3, "n": 5, "page": 16, "chunk_size": 128, "width": 129, "fanout": 8},
    {"lengths": [300, 40], "tokens": 4, "n": 50, "page": 16, "chunk_size": 2, "width": 512, "fanout": 8},
    {"lengths": [100, 40], "tokens": 4, "n": 50, "page": 16, "chunk_size": 32, "width": 1100, "fanout": 128},
]
every_size = pytest.mark.parametrize("sizes", SIZES)


def both(seed: int, sizes: dict[str, object], residual_dtype: torch.dtype | None = None) -> tuple[Requests, Requests]:
    requests = draw(seed, early=True, dtype=torch.float32, residual_dtype=residual_dtype, **sizes)
    return requests, requests.to("cuda")


@every_size
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16])
def test_read(sizes, residual_dtype):
    requests, mine = both(0, sizes, residual_dtype)
    want = plain_read(requests)
    assert_close(mine.read().cpu().double(), want, rtol=1e-4, atol=1e-4)
    assert_close(requests.read().double(), want, rtol=1e-4, atol=1e-4)


@every_size
@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_the_batch(sizes):
    _, requests = both(1, sizes)
    out = requests.read()
    assert all(torch.equal(out, requests.read()) for _ in range(3))
    for t, request in enumerate(requests.arguments["requests"].tolist()):
        if request >= 0:
            assert torch.equal(out[t], requests.read(**alone(requests, t))[0])


@every_size
def test_opcheck(sizes):
    torch.library.opcheck(torch.ops.fwpkm.log_read.default, as_operator(both(2, sizes)[1]))


@pytest.mark.unpoisoned
def test_a_cuda_graph_replays_what_eager_does():
    """Captured with one batch and replayed with another, of other lengths, on other pages, with other padding."""
    first, second = (both(seed, SIZES[2])[1] for seed in (0, 1))
    want = second.read()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first.read()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = first.read()
    for name, x in first.arguments.items():
        if isinstance(x, Tensor):
            x.copy_(second.arguments[name])
    for mine, other in zip(first.arguments["pages"], second.arguments["pages"], strict=True):
        mine.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(have, want)


@pytest.mark.unpoisoned
def test_offsets_beyond_32_bits():
    """The last pages of a buffer with more than 2^31 numbers."""
    width, page = 512, 16
    blocks = (2**31) // (width * page) + 64
    if torch.cuda.mem_get_info()[0] < 3 * blocks * page * width * 4:
        pytest.skip("needs 26 GB of free GPU memory")
    pages = PagedLog(
        torch.full((blocks, page, 1), -1, dtype=torch.int32, device="cuda"),
        torch.ones(blocks, page, 1, device="cuda"),
        torch.zeros(blocks, page, width, device="cuda"),
    )
    pages.slots[-1, 3], residual = 2, torch.randn(width, device="cuda")
    pages.residuals[-1, 4] = residual
    table = torch.tensor([[blocks - 1]], device="cuda")
    requests, lengths = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.tensor([page], device="cuda")
    slots, weights = torch.tensor([[2]], device="cuda"), torch.tensor([[0.5]], device="cuda")
    read = ops.log_read(torch.zeros(3, width, device="cuda"), slots, weights, pages, table, requests, lengths, page)
    assert_close(read[0], residual * 0.5)
