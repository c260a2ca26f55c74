"""``memory_read`` on its kernels, through the dispatcher: values, gradients, layouts, one graph, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm import ops, reference
from fwpkm.ops.cuda import memory_read as cuda
from tests.draws import Draw, seeds, strided


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")


@given(seed=seeds, n=st.integers(1, 6), shape=st.sampled_from([(), (0,), (3,), (2, 0), (2, 2)]),
       fanout=st.integers(1, 9), width=st.integers(1, 40), layout=st.sampled_from([torch.Tensor.clone, strided]),
       values_need_grad=st.booleans())  # fmt: skip
def test_read_and_gradients(seed, n, shape, fanout, width, layout, values_need_grad):
    draw = Draw(seed, torch.float32)
    values, weights = layout(draw.normal(n, width)), layout(draw.normal(*shape, fanout))
    slots, grad = layout(draw.integers(n, *shape, fanout)), layout(draw.normal(*shape, width))
    wide = [x.double().requires_grad_() for x in (values, weights)]
    want = (wide[1].unsqueeze(-1) * wide[0][slots]).sum(-2)
    out = cuda.forward(values, slots, weights)
    assert out.is_contiguous()
    assert_close(out.double(), want.detach(), rtol=1e-5, atol=1e-5)

    grad_values, grad_weights = cuda.backward(grad, values, slots, weights, values_need_grad)
    want_values, want_weights = torch.autograd.grad(want, wide, grad.double())
    assert grad_weights.is_contiguous()
    assert_close(grad_weights.double(), want_weights, rtol=1e-5, atol=1e-5)
    if values_need_grad:
        assert_close(grad_values.double(), want_values, rtol=1e-5, atol=1e-5)
    else:
        assert grad_values.shape == (0,)


def test_as_the_reference_reads(interpreted):
    draw = Draw(0, torch.float32)
    values, slots, weights = draw.normal(9, 5), draw.integers(9, 4, 3), draw.normal(4, 3)
    want = reference.memory_read(values, slots, weights)
    assert_close(ops.memory_read(values, slots, weights).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 0])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(interpreted, tokens, requires_grad):
    draw = Draw(1, torch.float32)
    values, weights = draw.normal(5, 4).requires_grad_(requires_grad), draw.normal(tokens, 2)
    slots = draw.integers(5, tokens, 2)
    torch.library.opcheck(torch.ops.fwpkm.memory_read.default, (values, slots, weights.requires_grad_(requires_grad)))
    arguments = (draw.normal(tokens, 4), values.detach(), slots, weights.detach(), True)
    torch.library.opcheck(torch.ops.fwpkm.memory_read_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_in_half_precision(interpreted, dtype):
    draw = Draw(3, torch.float32)
    values, slots, weights = draw.normal(5, 4), draw.integers(5, 3, 2), draw.normal(3, 2).to(dtype)
    torch.library.opcheck(torch.ops.fwpkm.memory_read.default, (values, slots, weights.requires_grad_()))
    arguments = (draw.normal(3, 4).to(dtype), values, slots, weights.detach(), True)
    torch.library.opcheck(torch.ops.fwpkm.memory_read_backward.default, arguments)


def test_autograd_and_transforms(interpreted, monkeypatch):
    draw = Draw(2, torch.float32)
    values, slots, weights = draw.normal(5, 4), draw.integers(5, 3, 2), draw.normal(3, 2)

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (values, weights)]
        eager = torch.autograd.grad(ops.memory_read(leaves[0], slots, leaves[1]).sin().sum(), leaves)
        samples = torch.func.vmap(
            torch.func.grad(lambda v, s, w: ops.memory_read(v, s, w).sin().sum(), (0, 2)), (None, 0, 0)
        )(values, slots, weights)
        return [*eager, *samples]

    have = gradients()
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "")
    for a, b in zip(have, gradients(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_kernels_compute_in_float32(interpreted):
    values, slots, weights = torch.ones(3, 2).double(), torch.zeros(1, 1).long(), torch.ones(1, 1).double()
    with pytest.raises(ValueError, match=r"values.dtype is torch.float64; expected torch.float32"):
        ops.memory_read(values, slots, weights)


def test_values_are_checked_when_asked(interpreted, monkeypatch):
    """Otherwise a slot outside the values reads nothing."""
    values, slots, weights = torch.ones(3, 2), torch.tensor([[1, 3]]), torch.ones(1, 2)
    assert ops.memory_read(values, slots, weights).tolist() == [[1.0, 1.0]]
    monkeypatch.setattr("fwpkm.ops._implementation.CHECKED", "1")
    with pytest.raises(ValueError, match=r"slots is in \[1, 3\]; expected slots in \[0, 3\)"):
        ops.memory_read(values, slots, weights)
    with pytest.raises(ValueError, match="weights holds NaN; expected numbers"):
        ops.memory_read(values, slots.clamp(max=2), weights * torch.nan)
    monkeypatch.setattr("fwpkm.ops._implementation.CHECKED", "0")
    ops.memory_read(values, slots, weights)
    monkeypatch.setattr("fwpkm.ops._implementation.CHECKED", "yes")
    with pytest.raises(ValueError, match="FWPKM_CHECK is 'yes'; expected '0' or '1'"):
        ops.memory_read(values, slots, weights)


@pytest.mark.unpoisoned
def test_same_bits_every_time():
    draw = Draw(3, torch.float32)
    values, slots, weights, grad = draw.normal(3, 5), draw.integers(3, 9, 2), draw.normal(9, 2), draw.normal(9, 5)

    def run():
        return [cuda.forward(values, slots, weights), *cuda.backward(grad, values, slots, weights, True)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
