"""``log_read`` from pages: what a token reads, of nothing but its request's committed records, whoever is beside it."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fwpkm import ops
from fwpkm.ops import Log, PagedLog
from tests.draws import Draw, seeds, strided
from tests.paged import Requests, draw_requests, plain_read

pytestmark = pytest.mark.numerical

requests_and_sizes = {
    "seed": seeds,
    "lengths": st.lists(st.integers(0, 14), min_size=1, max_size=4),
    "tokens": st.integers(0, 6),
    "page": st.integers(1, 5),
    "chunk_size": st.integers(1, 6),
    "lookahead": st.integers(0, 2),
    "early": st.booleans(),
    "anywhere": st.booleans(),
}


def draw(seed: int, lengths: list[int], early: bool, dtype: torch.dtype = torch.float64, **sizes) -> Requests:
    numbers = Draw(seed, dtype)
    origins = [int(numbers.integers(length + 3)) for length in lengths] if early else None
    return draw_requests(numbers, lengths, origins=origins, **sizes)


@given(fanout=st.integers(1, 4), width=st.integers(1, 6), slot_dtype=st.sampled_from([torch.int32, torch.int64]),
       residual_dtype=st.sampled_from([None, torch.bfloat16]), **requests_and_sizes)  # fmt: skip
def test_read(seed, lengths, early, **sizes):
    requests = draw(seed, lengths, early, **sizes)
    before = requests.arguments["values"].clone()
    out = requests.read()
    assert_close(out, plain_read(requests))
    assert out.is_contiguous()
    assert torch.equal(requests.arguments["values"], before)
    narrow = {name: requests.arguments[name].int() for name in ("requests", "block_table")}
    wide = {name: requests.arguments[name].long() for name in ("requests", "block_table")}
    assert torch.equal(requests.read(**narrow), out)
    assert torch.equal(requests.read(**wide), out)


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_counted_anew_from_an_origin(seed):
    requests = draw(seed, [14, 9], True, tokens=6, chunk_size=4)
    assert_close(requests.read(), plain_read(requests))


@pytest.mark.parametrize("seed", range(10))
def test_lengths_that_cut_a_chunk(seed):
    """The record after the last that counts is in its chunk, and its residual is not there yet."""
    requests = draw(seed, [14, 9], False, tokens=6, chunk_size=5, n=3, anywhere=True)
    assert_close(requests.read(), plain_read(requests))


@given(**requests_and_sizes)
def test_float32_within_tolerance_of_float64(seed, lengths, early, **sizes):
    requests = draw(seed, lengths, early, torch.float32, **sizes)
    assert_close(requests.read().double(), plain_read(requests), rtol=1e-5, atol=1e-5)


@given(seed=seeds, records=st.integers(0, 14), tokens=st.integers(1, 5), chunk_size=st.integers(1, 6),
       lookahead=st.integers(0, 2))  # fmt: skip
def test_reads_as_a_scan_with_the_same_log(seed, records, tokens, chunk_size, lookahead):
    numbers = Draw(seed)
    requests = draw_requests(numbers, [records], tokens, chunk_size=chunk_size, lookahead=lookahead)
    a = requests.arguments
    slots, coefficients, residuals = requests.records[0]
    chunks = torch.arange(records) // chunk_size
    for t in range(tokens):
        if a["requests"][t] < 0:
            continue
        lengths = a["lengths"][t : t + 1]
        log = Log(*(x.unsqueeze(0) for x in (slots, coefficients, residuals, chunks)), lengths, lookahead)
        read = a["slots"][t].view(1, 1, 1, -1), a["weights"][t].view(1, 1, 1, -1)
        nothing = numbers.normal(1, 1, 1, a["values"].shape[1])
        want = ops.memory_scan(a["values"], *read, read[1], nothing, nothing[..., 0], log)
        assert_close(requests.read()[t], want.flatten())


def alone(requests: Requests, t: int) -> dict[str, object]:
    """The arguments with which token ``t`` is read by itself, its request the only one."""
    a, request = requests.arguments, requests.arguments["requests"][t : t + 1]
    mine = {name: a[name][t : t + 1] for name in ("slots", "weights", "lengths")}
    origins = None if a["origins"] is None else a["origins"][request]
    return mine | {"block_table": a["block_table"][request], "requests": request * 0, "origins": origins}


@pytest.mark.unpoisoned
@given(**requests_and_sizes | {"tokens": st.integers(1, 6)})
def test_bits_do_not_depend_on_the_batch(seed, lengths, early, **sizes):
    requests = draw(seed, lengths, early, torch.float32, **sizes)
    out = requests.read()
    assert torch.equal(out, requests.read())
    for t, request in enumerate(requests.arguments["requests"].tolist()):
        if request >= 0:
            assert torch.equal(out[t], requests.read(**alone(requests, t))[0])
        else:
            assert not out[t].any()


@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_where_pieces_are_cut(monkeypatch):
    """Hot slots, added up in many pieces: in turns of any number of residuals, the same bits."""
    requests = draw(1, [200, 150, 90], False, torch.float32, tokens=8, n=3, width=40, page=8, chunk_size=16)
    out = requests.read()
    assert_close(out.double(), plain_read(requests), rtol=1e-5, atol=1e-4)
    module = sys.modules["fwpkm.ops.log_read"]
    for matched, gathered in ((1, 1), (100, 300), (1 << 30, 1 << 30)):
        monkeypatch.setattr(module, "_MATCHED_AT_ONCE", matched)
        monkeypatch.setattr(module, "_GATHERED_AT_ONCE", gathered)
        assert torch.equal(out, requests.read())
    monkeypatch.setattr(module, "_PIECE", 7)
    assert_close(requests.read(), out)
    for t in range(8):
        if requests.arguments["requests"][t] >= 0:
            assert torch.equal(requests.read()[t], requests.read(**alone(requests, t))[0])


def allocated(requests: Requests) -> int:
    """The most bytes that a read holds at a time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        requests.read()
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("hot", [False, True])
def test_pages_are_not_copied(hot, monkeypatch):
    """Neither where little matches nor where one slot is in every record."""
    monkeypatch.setattr(sys.modules["fwpkm.ops.log_read"], "_GATHERED_AT_ONCE", 1000)
    requests = draw(0, [4000] * 3, False, torch.float32, tokens=6, n=1 << 16, width=256, page=16, chunk_size=100)
    if hot:
        requests.arguments["slots"][:, 0] = 3
        requests.arguments["pages"].slots[..., 0] = 3
    assert allocated(requests) < 3 * 4000 * 256 * 4 * (0.5 if hot else 0.3)


def test_pages_of_others_are_not_copied():
    requests = draw(0, [50, 20], False, torch.float32, tokens=6, width=16, spare=20000)
    assert allocated(requests) < requests.arguments["pages"].slots.nbytes / 5


def arguments(tokens: int, layout: str = "contiguous") -> Requests:
    requests = draw(2, [9, 0, 5], True, torch.float32, tokens=tokens, residual_dtype=torch.bfloat16)
    if layout == "strided":
        spread = {k: strided(x) for k, x in requests.arguments.items() if isinstance(x, Tensor)}
        requests = requests._replace(arguments=requests.arguments | spread)
    return requests


def as_operator(requests: Requests) -> tuple[object, ...]:
    a = requests.arguments
    return (*(a[name] for name in ("values", "slots", "weights")), *a["pages"], *list(a.values())[4:])


@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_opcheck(tokens, layout):
    torch.library.opcheck(torch.ops.fwpkm.log_read.default, as_operator(arguments(tokens, layout)))


def test_strided_inputs_give_the_same():
    assert torch.equal(arguments(5, "strided").read(), arguments(5).read())


def test_empty_sizes():
    for sizes in (
        {"fanout": 0},
        {"width": 0},
        {"lengths": [0, 0]},
        {"lengths": [], "spare": 1},
        {"lengths": [], "spare": 0},
    ):
        requests = draw(3, **{"lengths": [5, 2], "early": False, "tokens": 3} | sizes)
        assert_close(requests.read(), plain_read(requests))


def test_one_graph_for_every_batch():
    """Whatever the numbers of tokens, requests and blocks."""
    compiled = torch.compile(ops.log_read, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for tokens, lengths in ((4, [7, 3]), (7, [5, 12, 20]), (3, [6, 2, 40, 8]), (5, [9] * 6)):
        requests = draw(tokens, lengths, True, torch.float32, tokens=tokens)
        with torch._dynamo.config.patch(error_on_recompile=tokens == 3):
            assert torch.equal(compiled(**requests.arguments), requests.read())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, for jvp
def test_no_gradient_and_no_transforms():
    requests = arguments(5)
    values, weights = requests.arguments["values"], requests.arguments["weights"]
    out = requests.read(weights=weights.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="log_read is for inference: it has no gradient"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="log_read is for inference: it has no gradient"):
        torch.func.grad(lambda v: requests.read(values=v).sum())(values)
    with pytest.raises(RuntimeError, match="log_read has no batching rule"):
        torch.func.vmap(lambda v: requests.read(values=v))(values.expand(2, -1, -1))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda v: requests.read(values=v), (values,), (values,))


def test_a_large_request_number_is_a_number():
    """32-bit request numbers times lengths need more bits."""
    requests = draw(7, [40], False, tokens=2, chunk_size=5)
    a = requests.arguments
    last = (1 << 31) // 40
    table = a["block_table"].expand(last + 1, -1)
    mine = torch.full((2,), last, dtype=torch.int32)
    a["slots"].clamp_(max=5)
    a["weights"].nan_to_num_(0.5)
    a["lengths"].fill_(40)
    want = plain_read(requests._replace(arguments=a | {"requests": mine * 0}))
    assert_close(requests.read(block_table=table, requests=mine), want)


def test_flops_of_the_base():
    with FlopCounterMode(display=False) as counter:
        arguments(5).read()
    assert counter.get_total_flops() == 2 * 5 * 3 * 5


def with_pages(**fields):
    return lambda a: {"pages": a["pages"]._replace(**{k: f(getattr(a["pages"], k)) for k, f in fields.items()})}


def changed(name: str, f):
    return lambda a: {name: f(a[name])}


def put(name: str, place: int, number: float):
    def change(a):
        x = a[name].clone()
        x[place] = number
        return {name: x}

    return change


BAD = [
    (changed("values", lambda x: x[0]), r"values.shape is \[5\]; expected \[N, Dv\]"),
    (changed("values", lambda x: x.half()), "values.dtype is torch.float16; expected torch.float32"),
    (changed("slots", lambda x: x[0]), r"slots.shape is \[3\]; expected \[T, K\]"),
    (changed("slots", lambda x: x.int()), "slots.dtype is torch.int32; expected torch.int64"),
    (changed("weights", lambda x: x[:4]), r"weights.shape is \[4, 3\]; expected \[5, 3\]"),
    (changed("weights", lambda x: x.double()), "weights.dtype is torch.float64; expected torch.float32"),
    (with_pages(slots=lambda x: x[..., :2]), r"pages.slots.shape is \[.*\]; expected \[blocks, page, 3\]"),
    (with_pages(slots=lambda x: x.short()), "pages.slots.dtype is torch.int16; expected torch.int32 or torch.int64"),
    (with_pages(coefficients=lambda x: x[1:]), r"pages.coefficients.shape is \[.*\]; expected \[\d+, 4, 3\]"),
    (with_pages(coefficients=lambda x: x.half()), "pages.coefficients.dtype is torch.float16; expected torch.float32"),
    (with_pages(residuals=lambda x: x[..., 1:]), r"pages.residuals.shape is \[.*\]; expected \[\d+, 4, 5\]"),
    (with_pages(residuals=lambda x: x.half()), "pages.residuals.dtype is torch.float16; expected torch.float32 or tor"),
    (with_pages(residuals=strided), r"pages.residuals.stride\(\) is .*; expected a contiguous last dimension"),
    (
        with_pages(**{k: lambda x: x[:, :0] for k in PagedLog._fields}),
        r"pages.slots.shape\[1\] is 0; expected pages of at least one record",
    ),
    (changed("block_table", lambda x: x[0]), r"block_table.shape is \[4\]; expected \[R, max_blocks\]"),
    (changed("block_table", lambda x: x.float()), "block_table.dtype is torch.float32; expected torch.int32"),
    (
        changed("block_table", lambda x: x.clamp(max=6) + 1),
        r"block_table is in \[\d, 7\]; expected numbers in \[0, 6\]",
    ),
    (changed("requests", lambda x: x[:4]), r"requests.shape is \[4\]; expected \[5\]"),
    (changed("requests", lambda x: x.float()), "requests.dtype is torch.float32; expected torch.int32"),
    (put("requests", 0, 3), r"requests is in \[\d, 3\]; expected numbers in \[0, 2\]"),
    (changed("lengths", lambda x: x[:4]), r"lengths.shape is \[4\]; expected \[5\]"),
    (changed("lengths", lambda x: x.int()), "lengths.dtype is torch.int32; expected torch.int64"),
    (put("lengths", 0, 17), r"lengths is in \[\d, 17\]; expected numbers in \[0, 16\]"),
    (put("lengths", 0, -1), r"lengths is in \[-1, \d+\]; expected numbers in \[0, 16\]"),
    (changed("chunk_size", lambda x: 0), "chunk_size is 0; expected a positive number of records"),
    (changed("lookahead", lambda x: -1), "lookahead is -1; expected a number of records"),
    (changed("origins", lambda x: x[:2]), r"origins.shape is \[2\]; expected \[3\]"),
    (changed("origins", lambda x: x.int()), "origins.dtype is torch.int32; expected torch.int64"),
    (changed("origins", lambda x: x * 0 - 1), r"origins is in \[-1, -1\]; expected numbers in \[0, \d+\]"),
    (put("slots", 0, 6), r"slots is in \[\d, 6\]; expected slots in \[0, 6\)"),
    (put("weights", 0, torch.nan), "weights holds NaN; expected numbers"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refused_with_one_clear_line(change, message):
    requests = arguments(5)
    requests.arguments["requests"][0] = 0
    requests.arguments["lengths"][0] = 9
    requests.arguments["slots"][0], requests.arguments["weights"][0] = 0, 1.0
    requests.read()
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        requests.read(**change(requests.arguments))
    assert "\n" not in str(caught.value)
