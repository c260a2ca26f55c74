"""The CUDA implementation of the key commit, interpreted, against the reference and the CPU operator in float64."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm import ops, reference
from fwpkm.ops.cuda import key_commit as cuda
from tests.draws import Draw, seeds, strided

cpu = sys.modules["fwpkm.ops.key_commit"]
EPS, RATE = 1e-3, 0.7
cases = {
    "seed": seeds,
    "memories": st.integers(1, 2),
    "tokens": st.integers(0, 5),
    "heads": st.sampled_from([1, 1, 2]),
    "n": st.integers(1, 9),
    "half": st.integers(1, 9),
    "score": st.sampled_from(["idw", "dot"]),
    "masked": st.booleans(),
    "shared": st.booleans(),
    "gaps": st.booleans(),
}


def draw_inputs(seed, memories, tokens, heads, n, half, score, masked, shared):
    """Float32 inputs, in float64 too, and the gradient of the result."""
    draw = Draw(seed, torch.float32)
    query, keys = (
        draw.normal(memories, tokens, heads, 2 * half),
        draw.normal(1 if shared else memories, heads, 2, n, half),
    )
    _, _, sub_scores, sub_slots = reference.product_key_address(query, keys, min(n, 3), score, EPS)
    mask = draw.integers(2, memories, tokens).bool() if masked else None
    narrow = [query, keys, sub_scores.float(), sub_slots, mask]
    return narrow, draw.normal(memories, heads, 2, n, half)


def wide(inputs):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]


def with_gaps(inputs):
    return [x if x is None else strided(x) for x in inputs]


def close(have, want):
    assert have.is_contiguous()
    assert have.dtype == torch.float32
    scale = max(1.0, want.abs().max().item() if want.numel() else 1.0)
    assert_close(have.double(), want, rtol=1e-4, atol=2e-5 * scale)


@given(**cases)
def test_forward(gaps, score, **sizes):
    inputs, _ = draw_inputs(score=score, **sizes)
    have = cuda.forward(*(with_gaps(inputs) if gaps else inputs), RATE, score)
    query, keys, *rest = wide(inputs)
    close(have, reference.key_commit(query, keys, *rest, RATE, score, EPS))


@given(**cases)
def test_backward(gaps, score, **sizes):
    """The operator's gradients: sub-scores are an input of their own."""
    inputs, grad = draw_inputs(score=score, **sizes)
    have = cuda.backward(*(with_gaps([grad, *inputs]) if gaps else [grad, *inputs]), RATE, score)
    want = cpu._backward_cpu(*wide([grad, *inputs]), RATE, score)
    for a, b in zip(have, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_total_derivative(score, monkeypatch):
    """Registered operators one after the other: the derivative of a commit goes through the sub-scores too."""
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")
    (query, keys, _, _, mask), grad = draw_inputs(3, 2, 5, 2, 5, 4, score, True, False)
    narrow = [query.requires_grad_(), keys.requires_grad_()]
    _, _, sub_scores, sub_slots = ops.product_key_address(*narrow, 3, score, EPS)
    out = ops.key_commit(*narrow, sub_scores, sub_slots, mask, RATE, score)
    have = torch.autograd.grad(out, narrow, grad)
    leaves = [x.detach().double().requires_grad_() for x in narrow]
    want = reference.key_commit(*leaves, None, sub_slots, mask, RATE, score, EPS)
    for a, b in zip(
        (out.detach(), *have), (want.detach(), *torch.autograd.grad(want, leaves, grad.double())), strict=True
    ):
        close(a, b)


def test_no_token_counts():
    """Sub-keys stay as they are, whatever is in the masked tokens."""
    (query, keys, sub_scores, sub_slots, _), _ = draw_inputs(0, 2, 4, 1, 5, 3, "idw", False, True)
    query, sub_scores = torch.full_like(query, torch.nan), torch.full_like(sub_scores, torch.nan)
    inputs = [query, keys, sub_scores, sub_slots, torch.zeros(2, 4, dtype=torch.bool)]
    assert torch.equal(cuda.forward(*inputs, RATE, "idw"), keys.expand(2, -1, -1, -1, -1))
