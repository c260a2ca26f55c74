"""``log_read`` on its kernels, through the dispatcher: what is read, of nothing but committed records."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm.ops.cuda import log_read as cuda
from tests.draws import Draw
from tests.ops.test_log_read import alone, arguments, as_operator, draw, requests_and_sizes
from tests.paged import Requests, draw_requests, plain_read


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")


def assert_read(requests: Requests) -> None:
    out = cuda.forward(*as_operator(requests))
    assert out.is_contiguous()
    assert_close(out.double(), plain_read(requests), rtol=1e-5, atol=1e-5)


@given(fanout=st.sampled_from([1, 3, 4, 9]), width=st.integers(1, 40),
       residual_dtype=st.sampled_from([None, torch.bfloat16]), slot_dtype=st.sampled_from([torch.int32, torch.int64]),
       **requests_and_sizes)  # fmt: skip
def test_read(seed, lengths, early, **sizes):
    assert_read(draw(seed, lengths, early, torch.float32, **sizes))


@pytest.mark.parametrize("seed", range(10))
def test_chunks_are_counted_anew_from_an_origin(seed):
    assert_read(draw(seed, [14, 9], True, torch.float32, tokens=3, chunk_size=4))


@pytest.mark.parametrize("seed", range(5))
def test_lengths_that_cut_a_chunk(seed):
    assert_read(draw(seed, [14, 9], False, torch.float32, tokens=6, chunk_size=5, n=3, anywhere=True))


def test_an_origin_makes_a_chunk_more():
    """Of pages that are full: 2, 4, 4 and 2 records."""
    requests = draw_requests(Draw(0, torch.float32), [12], 3, chunk_size=4, page=4, origins=[2], n=3)
    a = requests.arguments
    a["block_table"] = a["block_table"][:, :3]
    a["requests"].fill_(0)
    a["lengths"].fill_(12)
    a["weights"].nan_to_num_(0.5)
    a["slots"].clamp_(max=2)
    assert_read(requests)


@pytest.mark.parametrize("early", [False, True])
def test_more_chunks_than_pieces(early):
    requests = draw(0, [270], early, torch.float32, tokens=2, chunk_size=2, n=40, page=16)
    requests.arguments["requests"].fill_(0)
    requests.arguments["lengths"].copy_(torch.tensor([270, 262]))
    requests.arguments["weights"].nan_to_num_(0.5)
    requests.arguments["slots"].clamp_(max=39)
    assert_read(requests)


@pytest.mark.parametrize("early", [False, True])
def test_chunks_of_many_steps(early):
    """Of counting and of adding; one slot in most records, others in few."""
    requests = draw(1, [190], early, torch.float32, tokens=3, chunk_size=150, n=300, fanout=8, width=33, page=16)
    requests.arguments["requests"].fill_(0)
    requests.arguments["lengths"].fill_(150)
    requests.arguments["weights"].nan_to_num_(0.5)
    requests.arguments["slots"].clamp_(max=299)
    requests.arguments["slots"][:, 0] = 7
    requests.arguments["slots"][:, 1] = requests.records[0][0][20, 3].clamp(min=0)
    for t in range(0, 190, 2):
        requests.records[0][0][t, 5] = 7
        requests.arguments["pages"].slots[requests.arguments["block_table"][0, t // 16], t % 16, 5] = 7
    assert_read(requests)


def test_one_hit_wherever_it_is():
    requests = draw(6, [40], False, torch.float32, tokens=1, chunk_size=40, n=3, fanout=2, width=3, page=16)
    a, slots = requests.arguments, requests.records[0][0]
    a["requests"].fill_(0)
    a["lengths"].fill_(40)
    a["slots"].copy_(torch.tensor([[1, 2]]))
    a["weights"].fill_(1.0)
    a["pages"].slots.zero_()
    for u in range(39):
        slots.zero_()[u, 1] = 1
        place = a["pages"].slots[a["block_table"][0, u // 16], u % 16]
        place[1] = 1
        assert_read(requests)
        place[1] = 0


def test_many_slots_a_token_and_wide_values():
    assert_read(draw(2, [20, 33], True, torch.float32, tokens=2, chunk_size=9, n=50, fanout=70, width=530, page=16))


def test_a_length_beyond_the_pages_is_all_of_them():
    requests = draw(4, [12], False, torch.float32, tokens=2, chunk_size=4, page=4)
    a = requests.arguments
    a["requests"].fill_(0)
    a["weights"].nan_to_num_(0.5)
    a["slots"].clamp_(max=a["values"].shape[0] - 1)
    a["lengths"].fill_(12)
    assert_read(requests)
    want = cuda.forward(*as_operator(requests))
    a["lengths"].fill_(1 << 40)
    assert torch.equal(cuda.forward(*as_operator(requests)), want)


def test_padding_reads_no_slot():
    """Whatever its slots and weights are, and requests that there are not."""
    requests = draw(5, [8, 4], False, torch.float32, tokens=4)
    requests.arguments["requests"].copy_(torch.tensor([-1, 2, -7, 1 << 30]))
    requests.arguments["slots"].zero_()
    requests.arguments["weights"].fill_(torch.nan)
    requests.arguments["lengths"].fill_(4)
    assert not cuda.forward(*as_operator(requests)).any()


@pytest.mark.unpoisoned
@given(**requests_and_sizes | {"tokens": st.integers(1, 4)})
def test_bits_do_not_depend_on_the_batch(seed, lengths, early, **sizes):
    requests = draw(seed, lengths, early, torch.float32, **sizes)
    out = cuda.forward(*as_operator(requests))
    assert torch.equal(out, cuda.forward(*as_operator(requests)))
    for t, request in enumerate(requests.arguments["requests"].tolist()):
        if request >= 0:
            by_itself = requests._replace(arguments=requests.arguments | alone(requests, t))
            assert torch.equal(out[t], cuda.forward(*as_operator(by_itself))[0])
        else:
            assert not out[t].any()


def test_tokens_take_turns(monkeypatch):
    requests = draw(3, [20, 9], False, torch.float32, tokens=5)
    out = cuda.forward(*as_operator(requests))
    monkeypatch.setattr(cuda, "_SUMS_AT_ONCE", 100)
    requests.arguments["requests"] = requests.arguments["requests"].int()
    assert torch.equal(out, cuda.forward(*as_operator(requests)))


@pytest.mark.parametrize("tokens", [3, 0])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_opcheck(interpreted, tokens, layout):
    torch.library.opcheck(torch.ops.fwpkm.log_read.default, as_operator(arguments(tokens, layout)))


def test_empty_sizes(interpreted):
    empty = {"fanout": 0}, {"width": 0}, {"lengths": [0, 0]}, {"lengths": []}, {"lengths": [], "spare": 0}
    for sizes in empty:
        requests = draw(3, **{"lengths": [5, 2], "early": False, "tokens": 3, "dtype": torch.float32} | sizes)
        assert_close(requests.read().double(), plain_read(requests))


def test_kernels_compute_in_float32(interpreted):
    with pytest.raises(ValueError, match=r"values.dtype is torch.float64; expected torch.float32"):
        draw(4, [3], False, tokens=2).read()


def one_token() -> Requests:
    requests = draw(5, [4], False, torch.float32, tokens=1, chunk_size=2, n=3, fanout=2)
    requests.arguments["requests"].fill_(0)
    requests.arguments["lengths"].fill_(4)
    requests.arguments["slots"].copy_(torch.tensor([[1, 2]]))
    requests.arguments["weights"].fill_(1.0)
    return requests


def test_values_are_checked_when_asked(interpreted, monkeypatch):
    """Otherwise what is out of range is not there: no record, no row, no token."""
    requests = one_token()
    want = requests.read()
    wrong = {
        "slots": (torch.tensor([[1, 3]]), r"slots is in \[1, 3\]; expected slots in \[0, 3\)"),
        "weights": (torch.tensor([[1.0, torch.nan]]), "weights holds NaN"),
        "requests": (torch.tensor([1]), r"requests is in \[1, 1\]; expected numbers in \[0, 0\]"),
        "lengths": (torch.tensor([9]), r"lengths is in \[9, 9\]; expected numbers in \[0, 8\]"),
        "block_table": (torch.tensor([[1 << 20, 0]]), r"block_table is in \[1048576, 1048576\]; expected numbers in"),
    }
    without_records = {"lengths": torch.tensor([0])}
    assert torch.equal(requests.read(slots=wrong["slots"][0]), requests.read(weights=torch.tensor([[1.0, 0.0]])))
    assert not requests.read(requests=wrong["requests"][0]).any()
    have = requests.read(block_table=wrong["block_table"][0])
    assert torch.equal(have, requests.read(**without_records))
    assert not torch.equal(have, want)
    monkeypatch.setattr("fwpkm.ops._implementation.CHECKED", "1")
    assert torch.equal(requests.read(), want)
    for name, (argument, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            requests.read(**{name: argument})
