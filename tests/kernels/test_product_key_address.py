"""The CUDA implementation of addresses, interpreted: values, ties, layouts, gradients."""

import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

import fwpkm.ops  # noqa: F401 (the CPU implementation's module is found by its name)
from fwpkm import reference
from fwpkm.ops.cuda import product_key_address as cuda
from fwpkm.ops.kernels import select_subkeys
from tests.draws import Draw, seeds, strided

cpu = sys.modules["fwpkm.ops.product_key_address"]
EPS = 1e-3
sizes = {"memories": st.integers(1, 2), "tokens": st.integers(0, 20), "heads": st.sampled_from([1, 1, 4])}
scores = st.sampled_from(["idw", "dot"])


def draw_inputs(seed, memories, tokens, heads, n, half, shared):
    draw = Draw(seed, torch.float32)
    return draw.normal(memories, tokens, heads, 2 * half), draw.normal(1 if shared else memories, heads, 2, n, half)


def check(have, query, keys, k, score):
    """Sub-scores and scores are those of float64 at the kernel's own slots, and none left out is better by a margin."""
    have_scores, slots, sub_scores, sub_slots = have
    n = keys.shape[3]
    assert [x.dtype for x in have] == [torch.float32, torch.int64] * 2
    assert all(x.is_contiguous() for x in have)
    every = reference.sub_scores(query, keys, score, EPS)
    assert_close(sub_scores.double(), every.gather(-1, sub_slots), rtol=1e-4, atol=2e-5)
    assert (sub_slots.sort(-1).values.diff(dim=-1) > 0).all()
    left_out = every.scatter(-1, sub_slots, -torch.inf).amax(-1)
    assert (left_out <= every.gather(-1, sub_slots).amin(-1) + 1e-4).all()
    assert (sub_scores.diff(dim=-1) <= 0).all()
    # Both halves' best as the kernel gave them, combined.
    best = torch.full(every.shape, -torch.inf, dtype=torch.float64).scatter(-1, sub_slots, sub_scores.double())
    want = reference.product_key_topk(best, k)
    assert_close(have_scores.double(), want[0], rtol=1e-6, atol=1e-6)
    margin = every.new_tensor(1e-5)
    clear = (want[0].diff(dim=-1) < -margin).all(-1)
    assert torch.equal(slots[clear], want[1][clear])
    assert ((slots >= 0) & (slots < n * n)).all()


@given(
    seed=seeds,
    n=st.integers(1, 80),
    half=st.integers(1, 40),
    score=scores,
    shared=st.booleans(),
    data=st.data(),
    **sizes,
)
def test_forward(seed, n, half, score, shared, data, memories, tokens, heads):
    k = data.draw(st.one_of(st.integers(1, min(n, 6)), st.just(min(n, 12))))
    query, keys = draw_inputs(seed, memories, tokens, heads, n, half, shared)
    layout = data.draw(st.sampled_from(["contiguous", "gaps", "slice"]))
    given_query, given_keys = query, keys
    if layout == "gaps":
        given_query, given_keys = strided(query), strided(keys)
    if layout == "slice":  # tokens of a longer sequence
        given_query = torch.cat((query, torch.full_like(query, torch.nan)), 1)[:, :tokens]
    check(cuda.forward(given_query, given_keys, k, score, EPS), query, keys, k, score)


@pytest.mark.parametrize(("heads", "n", "k", "score"), [(1, 70, 70, "idw"), (4, 40, 32, "dot")])
def test_many_of_a_codebook(heads, n, k, score):
    query, keys = draw_inputs(0, 1, 3, heads, n, 5, False)
    check(cuda.forward(query, keys, k, score, EPS), query, keys, k, score)


@given(seed=seeds, n=st.integers(2, 100), score=scores)
def test_ties(seed, n, score):
    """Numbers of a few levels: products are exact, equal sub-keys are many, and the lower one wins."""
    draw, k = Draw(seed), min(n, 8)
    query, keys = draw.integers(3, 2, 3, 1, 4).float(), draw.integers(2, 2, 1, 2, n, 2).float()
    have = cuda.forward(query, keys, k, score, EPS)
    want = cpu._cpu(query, keys, k, score, EPS)
    assert torch.equal(have[3], want[3])
    assert torch.equal(have[3], reference.product_key_address(query, keys, k, score, EPS)[3])
    assert_close(have[2], want[2], rtol=1e-6, atol=1e-6)
    if score == "dot":  # sums are exact too
        assert torch.equal(have[1], want[1])


def test_a_query_on_its_key_has_distance_zero():
    """Rounding makes some squared distances negative: they are clamped."""
    keys = Draw(0, torch.float32).normal(1, 1, 2, 64, 8) * 100
    query = torch.cat((keys[:, :, 0, :32], keys[:, :, 1, :32]), -1).transpose(1, 2)
    _, slots, sub_scores, _ = cuda.forward(query, keys, 1, "idw", EPS)
    assert (sub_scores <= -torch.log(torch.tensor(EPS)) + 1e-5).all()
    assert sub_scores.isfinite().all()
    assert slots.flatten().tolist() == [65 * i for i in range(32)]


def test_nan_stays_in_range_and_shows():
    query, keys = draw_inputs(0, 1, 20, 1, 40, 3, False)
    query[0, 5, 0, 1] = torch.nan
    keys[0, 0, 1, 17] = torch.nan
    with_nan = cuda.forward(query, keys, 4, "idw", EPS)
    assert ((with_nan[1] >= 0) & (with_nan[1] < 1600)).all()
    assert ((with_nan[3] >= 0) & (with_nan[3] < 40)).all()
    assert with_nan[2][0, 5, 0, 0].isnan().all()
    assert (with_nan[3][0, :, 0, 1, 0] == 17).all()
    assert with_nan[2][0, :, 0, 1, 0].isnan().all()
    assert torch.equal(with_nan[2][0, 6:, 0, 0], cuda.forward(query, keys.nan_to_num(), 4, "idw", EPS)[2][0, 6:, 0, 0])


def test_tiles_do_not_show(monkeypatch):
    """Other tiles of tokens, which a batch and a single sequence have, and other blocks of sub-keys."""
    query, keys = draw_inputs(1, 1, 40, 2, 70, 6, False)
    whole = cuda.forward(query, keys, 5, "idw", EPS)
    pieces = [cuda.forward(x, keys, 5, "idw", EPS) for x in query.split(7, 1)]
    for i, want in enumerate(whole):
        assert_close(torch.cat([piece[i] for piece in pieces], 1), want)
    monkeypatch.setattr(select_subkeys, "_BLOCK_N", 32)
    assert torch.equal(cuda.forward(query, keys, 5, "idw", EPS)[3], whole[3])


@given(
    seed=seeds,
    n=st.integers(1, 12),
    half=st.integers(1, 20),
    score=scores,
    shared=st.booleans(),
    gaps=st.booleans(),
    reach=st.booleans(),
    **sizes,
)
def test_backward(seed, n, half, score, shared, gaps, reach, memories, tokens, heads):
    tokens, heads = min(tokens, 5), min(heads, 2)
    k = min(n, 3)
    query, keys = draw_inputs(seed, memories, tokens, heads, n, half, shared)
    wide = [x.double().requires_grad_() for x in (query, keys)]
    out = reference.product_key_address(*wide, k, score, EPS)
    draw = Draw(seed + 1)
    grads = [draw.normal(*out[0].shape), draw.normal(*out[2].shape)]
    assume(score == "dot" or out[2].numel() == 0 or out[2].max() < 4)  # nearer sub-keys magnify rounding
    of_loss = out[2] if reach else reference.product_key_address(wide[0].detach(), wide[1], k, score, EPS)[2]
    want = torch.autograd.grad((out[0], of_loss), wide, grads)
    inputs = [grads[0].float(), grads[1].float(), query, keys, out[1], out[2].detach().float(), out[3]]
    inputs = [strided(x) for x in inputs] if gaps else inputs
    have = cuda.backward(*inputs, score, reach)
    for a, b, narrow in zip(have, want, (query, keys), strict=True):
        assert a.shape == narrow.shape
        assert a.is_contiguous()
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    on_cpu = cpu._backward_cpu(*(x.double() if x.is_floating_point() else x for x in inputs), score, reach)
    for a, b in zip(have, on_cpu, strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
