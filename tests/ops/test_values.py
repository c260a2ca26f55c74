"""What each operator computes, against the reference in float64, on random sizes, with ties and crowded slots."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fwpkm import ops, reference
from fwpkm.ops import Log
from tests.draws import Draw, seeds

sizes = {"memories": st.integers(1, 3), "tokens": st.integers(0, 9), "heads": st.integers(1, 2)}
scores = st.sampled_from(["idw", "dot"])


@given(seed=seeds, n=st.integers(1, 12), levels=st.integers(1, 6), data=st.data(), **sizes)
def test_topk_with_ties(seed, n, levels, data, memories, tokens, heads):
    """Sub-scores of a few levels are full of ties: of equal ones the lower sub-key and the lower grid position win."""
    k = data.draw(st.integers(1, n))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    sub_scores = Draw(seed).integers(levels, memories, tokens, heads, 2, n).to(dtype)
    have, want = ops.product_key_topk(sub_scores, k), reference.product_key_topk(sub_scores, k)
    assert torch.equal(have[0].double(), want[0])
    assert torch.equal(have[1], want[1])
    assert torch.equal(have[2], want[2])


@pytest.mark.parametrize("n", [32, 64, 104])
@pytest.mark.parametrize("levels", [4, 1000])
def test_topk_of_many_sub_keys(n, levels):
    """Of which a few groups are looked at, if there are no ties for the last place."""
    for k in (1, 3):
        sub_scores = Draw(n + k).integers(levels, 3, 20, 2, 2, n).double()
        for have, want in zip(
            ops.product_key_topk(sub_scores, k), reference.product_key_topk(sub_scores, k), strict=True
        ):
            assert torch.equal(have, want)


def test_topk_negative_zero_ties_with_zero():
    sub_scores = torch.tensor([[[-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]]])
    _, slots, sub_slots = ops.product_key_topk(sub_scores, 2)
    assert slots.tolist() == [[0, 1]]
    assert sub_slots.tolist() == [[[0, 1], [0, 1]]]


@given(seed=seeds, n=st.integers(1, 12), half=st.integers(1, 5), score=scores, shared=st.booleans(), **sizes)
def test_address(seed, n, half, score, shared, memories, tokens, heads):
    draw = Draw(seed)
    query, keys = (
        draw.normal(memories, tokens, heads, 2 * half),
        draw.normal(1 if shared else memories, heads, 2, n, half),
    )
    k = min(3, n)
    have, want = ops.product_key_address(query, keys, k, score), reference.product_key_address(query, keys, k, score)
    for a, b in zip(have, want, strict=True):
        assert_close(a, b)


def test_address_in_blocks(monkeypatch):
    """Many tokens are scored block by block; the seams do not show."""
    draw = Draw(0)
    query, keys = draw.normal(2, 50, 2, 6).requires_grad_(), draw.normal(2, 2, 2, 7, 3).requires_grad_()

    def run() -> list[Tensor]:
        out = ops.product_key_address(query, keys, 3)
        return [*out, *torch.autograd.grad(out[0].sin().sum() + out[2].cos().sum(), (query, keys))]

    whole = run()
    monkeypatch.setattr(sys.modules["fwpkm.ops.product_key_address"], "_BLOCK", 400)
    for a, b in zip(run(), whole, strict=True):
        assert_close(a, b)


def test_a_query_on_its_key_has_distance_zero():
    """Rounding makes some squared distances negative: they are clamped."""
    keys = Draw(0, torch.float32).normal(1, 1, 2, 64, 8) * 100
    query = torch.cat((keys[:, :, 0, :32], keys[:, :, 1, :32]), -1).transpose(1, 2)
    scores, slots, sub_scores, _ = ops.product_key_address(query, keys, 1)
    assert sub_scores.isfinite().all()
    assert (sub_scores <= -torch.log(torch.tensor(1e-3)) + 1e-5).all()
    assert slots.flatten().tolist() == [65 * i for i in range(32)]
    assert scores.isfinite().all()


@given(seed=seeds, n=st.integers(2, 8), score=scores, masked=st.booleans(), shared=st.booleans(), **sizes)
def test_key_commit(seed, n, score, masked, shared, memories, tokens, heads):
    draw, half, k = Draw(seed), 3, 2
    query, keys = (
        draw.normal(memories, tokens, heads, 2 * half),
        draw.normal(1 if shared else memories, heads, 2, n, half),
    )
    mask = draw.integers(2, memories, tokens).bool() if masked else None
    leaves = [query.requires_grad_(), keys.requires_grad_()]
    _, _, sub_scores, sub_slots = ops.product_key_address(query, keys, k, score)
    have = ops.key_commit(query, keys, sub_scores, sub_slots, mask, 0.7, score)
    want = reference.key_commit(query, keys, sub_scores, sub_slots, mask, 0.7, score, 1e-3)
    assert_close(have, want.expand_as(have))
    weight = draw.normal(*have.shape)
    grads = [torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (have, want)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-7, atol=1e-9)


@given(seed=seeds, tokens=st.integers(0, 4), score=scores, shared=st.booleans())
def test_sub_scores_that_do_not_reach_the_query(seed, tokens, score, shared):
    """A loss of the sub-scores shapes the sub-keys as it does anyway, and the query not at all."""
    draw, k = Draw(seed), 2
    query = draw.normal(2, tokens, 1, 6).requires_grad_()
    keys = draw.normal(1 if shared else 2, 1, 2, 5, 3).requires_grad_()
    out = ops.product_key_address(query, keys, k, score, sub_scores_reach_query=False)
    want = reference.product_key_address(query, keys, k, score)
    of_keys = reference.product_key_address(query.detach(), keys, k, score)[2]
    weights = draw.normal(*out[0].shape), draw.normal(*out[2].shape)
    have = torch.autograd.grad((out[0], out[2]), (query, keys), weights)
    for a, b in zip(have, torch.autograd.grad((want[0], of_keys), (query, keys), weights), strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-9)
    options = k, score, 1e-3, False
    torch.library.opcheck(torch.ops.fwpkm.product_key_address.default, (query, keys, *options))


@given(seed=seeds, tokens=st.integers(0, 20), fanout=st.integers(1, 5), n=st.integers(1, 6))
def test_read(seed, tokens, fanout, n):
    draw = Draw(seed)
    values, slots, weights = draw.normal(n, 3), draw.integers(n, tokens, fanout), draw.normal(tokens, fanout)
    assert_close(ops.memory_read(values, slots, weights), reference.memory_read(values, slots, weights))


scan_sizes = {"memories": st.integers(1, 3), "steps": st.integers(1, 4), "tokens": st.integers(0, 6)}


def draw_scan(draw: Draw, memories: int, steps: int, tokens: int, fanout: int, n: int) -> dict[str, Tensor]:
    shape = (memories, steps, tokens, fanout)
    return {
        "values": draw.normal(n, 3),
        "slots": draw.integers(n, *shape),
        "weights": draw.normal(*shape),
        "coefficients": draw.normal(*shape) * 0.3,
        "targets": draw.normal(*shape[:3], 3),
        "gates": draw.uniform(*shape[:3]),
    }


@given(seed=seeds, fanout=st.integers(1, 4), n=st.integers(1, 9), **scan_sizes)
def test_scan(seed, fanout, n, **size):
    inputs = draw_scan(Draw(seed), **size, fanout=fanout, n=n)
    untouched = inputs["values"].clone()
    want, _ = reference.memory_scan(**inputs)
    assert_close(ops.memory_scan(**inputs), want)
    assert torch.equal(inputs["values"], untouched)


@given(
    seed=seeds,
    records=st.integers(0, 12),
    chunk=st.integers(1, 5),
    lookahead=st.integers(0, 2),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    **scan_sizes,
)
def test_scan_continues_from_a_log(seed, records, chunk, lookahead, dtype, **size):
    """Version 0 is the values plus the log's first records: coefficients by the reads of a slot in their chunk, times
    the residual that the record ``lookahead`` later has, if it counts and is in the same chunk.
    """
    draw, fanout, n, memories = Draw(seed), 3, 6, size["memories"]
    inputs = draw_scan(draw, **size, fanout=fanout, n=n)
    chunks = (torch.arange(records) // chunk * 7 + 3).expand(memories, -1)
    lengths = draw.integers(records + 1, memories)
    log = Log(
        draw.integers(n + 1, memories, records, fanout) - 1,
        draw.normal(memories, records, fanout),
        draw.normal(memories, records, 3).to(dtype),
        chunks,
        lengths,
        lookahead,
    )
    have = ops.memory_scan(**inputs, log=log)
    for m in range(memories):
        values = inputs["values"].clone()
        for number in chunks[m, : lengths[m]].unique():
            of_chunk = chunks[m, : lengths[m]] == number
            slots, coefficients, residuals = (x[m, : lengths[m]][of_chunk] for x in log[:3])
            counts = (slots + 1).flatten().bincount(minlength=n + 1)[1:]
            for p in range(slots.shape[0] - lookahead):
                for j in range(fanout):
                    if slots[p, j] >= 0:
                        write = coefficients[p, j] / counts[slots[p, j]] * residuals[p + lookahead].double()
                        values[slots[p, j]] += write
        own = {k: v if k == "values" else v[m : m + 1] for k, v in inputs.items()} | {"values": values}
        assert_close(have[m : m + 1], reference.memory_scan(**own)[0])


def test_scan_rewinds_hot_rows_over_many_chunks():
    """The backward rewinds the values instead of keeping them: after 256 chunks on 4 rows gradients are within 1e-4."""
    draw = Draw(0, torch.float32)
    inputs = draw_scan(draw, 1, 256, 8, 4, 4)
    counts = 8.0  # 32 reads of 4 rows
    inputs["weights"] = inputs["weights"].softmax(-1)
    inputs["coefficients"] = inputs["weights"] / counts * 2
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in inputs.items() if k != "slots"}
        out = ops.memory_scan(slots=inputs["slots"], **leaves)
        grads.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    for narrow, wide in zip(*grads, strict=True):
        assert (narrow - wide).abs().max() <= 1e-4 * wide.abs().max()


@given(seed=seeds, tokens=st.integers(0, 20), fanout=st.integers(1, 5), n=st.integers(1, 6))
def test_write(seed, tokens, fanout, n):
    draw = Draw(seed)
    values, slots = draw.normal(n, 3), draw.integers(n, tokens, fanout)
    coefficients, residuals = draw.normal(tokens, fanout), draw.normal(tokens, 3)
    want = values.clone()
    for p in range(tokens):
        for j in range(fanout):
            want[slots[p, j]] += coefficients[p, j] * residuals[p]
    rest = torch.ones(n, dtype=torch.bool)
    rest[slots.flatten()] = False
    untouched = values[rest].clone()
    assert ops.memory_write_(values, slots, coefficients, residuals) is values
    assert_close(values, want)
    assert torch.equal(values[rest], untouched)


def test_write_copies_nothing():
    values = torch.zeros(1 << 16, 64)
    draw = Draw(0, torch.float32)
    arguments = draw.integers(1 << 16, 8, 4), draw.normal(8, 4), draw.normal(8, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.memory_write_(values, *arguments)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert allocated < values.nbytes / 100


def test_scan_work_does_not_grow_with_the_slots():
    """What a scan allocates, forward and backward, is the same for 2^10 and 2^18 slots."""
    allocated = []
    for n in (1 << 10, 1 << 18):
        inputs = draw_scan(Draw(0, torch.float32), 2, 3, 8, 4, n)
        inputs["weights"].requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            ops.memory_scan(**inputs).sum().backward()
        events = profile.key_averages()
        allocated.append(sum(e.self_cpu_memory_usage for e in events if e.self_cpu_memory_usage > 0))
    assert allocated[1] < 1.5 * allocated[0]


def test_a_write_between_read_and_backward():
    """``memory_scan`` keeps what it read; ``memory_read`` says that its values have changed, and never uses them."""
    draw = Draw(0)
    inputs = draw_scan(draw, 1, 2, 3, 2, 5)
    weights = inputs["weights"].requires_grad_()
    write = draw.integers(5, 4, 2), draw.normal(4, 2), draw.normal(4, 3)
    (want,) = torch.autograd.grad(ops.memory_scan(**inputs).sin().sum(), weights)
    out = ops.memory_scan(**inputs)
    ops.memory_write_(inputs["values"], *write)
    (have,) = torch.autograd.grad(out.sin().sum(), weights)
    assert torch.equal(have, want)

    read = ops.memory_read(inputs["values"], inputs["slots"], weights)
    ops.memory_write_(inputs["values"], *write)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


@given(
    seed=seeds,
    memories=st.integers(1, 2),
    steps=st.integers(0, 4),
    tokens=st.integers(1, 5),
    score=st.sampled_from(["idw", "dot"]),
    shared=st.booleans(),
    is_cut=st.booleans(),
)
def test_key_scan_is_address_and_commit_in_turn(seed, memories, steps, tokens, score, shared, is_cut):
    """Outputs and gradients of the operator are those of its two parts in turn, with keys detached at cuts."""
    draw = Draw(seed)
    query = draw.normal(memories, steps, tokens, 2, 6).requires_grad_()
    keys = draw.normal(1 if shared else memories, 2, 2, 5, 3).requires_grad_()
    mask = draw.integers(3, memories, steps, tokens) > 0
    cut = draw.integers(2, memories, steps).bool() if is_cut else None
    found, moved = [], keys.expand(memories, -1, -1, -1, -1)
    for s in range(steps):
        if cut is not None:
            moved = torch.where(cut[:, s].view(-1, 1, 1, 1, 1), moved.detach(), moved)
        found.append(ops.product_key_address(query[:, s], moved, 3, score))
        moved = ops.key_commit(query[:, s], moved, *found[-1][2:], mask[:, s], 0.6, score)
    have = ops.product_key_scan(query, keys, 3, mask, 0.6, score, cut=cut)
    assert_close(have.keys, moved)
    want = [torch.stack(parts, 1) for parts in zip(*found, strict=True)] if steps else []
    for a, b in zip(have[:4], want, strict=bool(steps)):
        assert_close(a, b)

    def total(outputs):
        return sum(x.sin().sum() for x in outputs if x.is_floating_point())

    want_grads = torch.autograd.grad(total([*want, moved]), (query, keys), materialize_grads=True, allow_unused=True)
    for a, b in zip(torch.autograd.grad(total(have), (query, keys)), want_grads, strict=True):
        assert_close(a, b)
