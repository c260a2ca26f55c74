"""The CUDA implementation of product-key top-k, interpreted: values, ties, layouts, what is not a number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import reference
from fwpkm.ops.cuda import product_key_topk as cuda
from fwpkm.ops.kernels import select_scores
from tests.draws import Draw, seeds, strided


def check(sub_scores, k):
    have, want = cuda.forward(sub_scores, k), reference.product_key_topk(sub_scores, k)
    for a, b in zip(have[1:], want[1:], strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()
    torch.testing.assert_close(have[0].double(), want[0], rtol=1e-6, atol=1e-6)


@given(
    seed=seeds,
    levels=st.integers(1, 6),
    n=st.integers(1, 20),
    leading=st.lists(st.integers(0, 3), max_size=2),
    gaps=st.booleans(),
    data=st.data(),
)
def test_topk_with_ties(seed, levels, n, leading, gaps, data):
    """Sub-scores of a few levels, zeros of both signs among them, are full of ties."""
    k = data.draw(st.one_of(st.just(n), st.integers(1, min(n, 8))))
    draw = Draw(seed, torch.float32)
    sub_scores = draw.integers(levels, *leading, 2, 2, n) - float(levels // 2)
    sub_scores *= draw.integers(2, *sub_scores.shape) * 2.0 - 1
    check(strided(sub_scores) if gaps else sub_scores, k)


def test_gaps_between_the_sub_scores_of_one_head():
    check(strided(Draw(0, torch.float32).normal(1, 2, 9)), 3)


@pytest.mark.parametrize(("n", "k"), [(1100, 32), (33, 32)])
def test_topk_of_several_blocks(n, k):
    """Ties across blocks of sub-keys; levels half apart, whose sums are exact."""
    check(Draw(n).integers(200, 2, 2, n).float() / 2, k)
    check(Draw(n).integers(3, 2, 2, n).float() / 2, k)


def test_blocks_of_any_size(monkeypatch):
    """A block that has less than ``k`` sub-keys."""
    monkeypatch.setattr(select_scores, "_BLOCK_N", 16)
    check(Draw(0).integers(9, 5, 1, 2, 70).float(), 20)


def test_infinities_and_nan_stay_in_range():
    """NaN ranks first, as in ``torch.topk``, whatever its sign; slots are never out of range."""
    n, k = 9, 9
    sub_scores = Draw(0, torch.float32).normal(6, 2, n)
    sub_scores[0] = -torch.inf
    sub_scores[1] = torch.nan
    sub_scores[2, :, ::2] = torch.inf
    sub_scores[3, 0, 4] = torch.nan
    sub_scores[4, 1, 7] = -torch.tensor(torch.nan)
    scores, slots, sub_slots = cuda.forward(sub_scores, k)
    assert ((slots >= 0) & (slots < n * n)).all()
    assert torch.equal(sub_slots.sort(-1).values, torch.arange(n).expand(6, 2, n))
    assert sub_slots[3, 0, 0] == 4
    assert sub_slots[4, 1, 0] == 7
    assert scores[1].isnan().all()
    assert torch.equal(slots[0], torch.arange(n))  # all sums are equal: the first row of the grid
    assert torch.equal(slots[5], reference.product_key_topk(sub_scores[5:], k)[1][0])


@given(seed=seeds, n=st.integers(1, 40), leading=st.lists(st.integers(0, 3), max_size=2), gaps=st.booleans())
def test_backward(seed, n, leading, gaps):
    k, draw = min(n, 5), Draw(seed)
    sub_scores, grad = draw.normal(*leading, 2, 2, n), draw.normal(*leading, 2, k)
    _, slots, sub_slots = reference.product_key_topk(sub_scores, k)
    layout = strided if gaps else lambda x: x
    have = cuda.backward(layout(grad.float()), layout(slots), layout(sub_slots), n)
    assert have.is_contiguous()
    leaf = sub_scores.requires_grad_()
    (want,) = torch.autograd.grad(reference.product_key_topk(leaf, k)[0], leaf, grad)
    torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-6)
