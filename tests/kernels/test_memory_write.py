"""``memory_write_`` on its kernels, through the dispatcher: in place, only where it should, and known to autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm import ops
from fwpkm.ops.cuda import memory_write as cuda
from tests.draws import Draw, seeds, strided


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")


@given(seed=seeds, n=st.integers(1, 9), tokens=st.integers(0, 8), fanout=st.integers(1, 5), width=st.integers(1, 40),
       layout=st.sampled_from([torch.Tensor.clone, strided]))  # fmt: skip
def test_write(seed, n, tokens, fanout, width, layout):
    draw = Draw(seed, torch.float32)
    values, slots = draw.normal(n, width), draw.integers(n, tokens, fanout)
    coefficients, residuals = draw.normal(tokens, fanout), draw.normal(tokens, width)
    want = values.double()
    for p in range(tokens):
        for j in range(fanout):
            want[slots[p, j]] += coefficients[p, j].double() * residuals[p].double()
    before = values.clone()
    cuda.forward(values, *map(layout, (slots, coefficients, residuals)))
    assert_close(values.double(), want, rtol=1e-5, atol=1e-5)
    rest = torch.ones(n, dtype=torch.bool)
    rest[slots.flatten()] = False
    assert torch.equal(values[rest], before[rest])


def arguments(tokens):
    draw = Draw(0, torch.float32)
    return draw.normal(7, 4), draw.integers(7, tokens, 2), draw.normal(tokens, 2), draw.normal(tokens, 4)


@pytest.mark.parametrize("tokens", [5, 0])
def test_opcheck(interpreted, tokens):
    torch.library.opcheck(torch.ops.fwpkm.memory_write_.default, arguments(tokens))


def test_in_place_and_for_each_sample(interpreted, monkeypatch):
    values, *others = arguments(5)
    stacked = torch.stack([values, values + 1])
    assert ops.memory_write_(values, *others) is values
    torch.func.vmap(lambda v: ops.memory_write_(v, *others))(stacked)
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "")
    want = ops.memory_write_(arguments(5)[0], *others)
    assert_close(values, want)
    assert_close(stacked, torch.stack([want, want + 1]))


def test_autograd_notices_the_write(interpreted):
    """A backward that needs the values as they were read must not use others."""
    values, slots, coefficients, residuals = arguments(5)
    version = values._version
    out = ops.memory_read(values, slots, coefficients.clone().requires_grad_())
    ops.memory_write_(values, slots, coefficients, residuals)
    assert values._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writes_under_inference_mode(interpreted):
    with torch.inference_mode():
        values, *others = arguments(5)
        before = values.clone()
        ops.memory_write_(values, *others)
    assert not torch.equal(values, before)


def test_slots_are_checked_when_asked(interpreted, monkeypatch):
    """Otherwise a slot outside the values is written nowhere."""
    values, slots, coefficients, residuals = (
        torch.zeros(3, 2),
        torch.tensor([[1, 3]]),
        torch.ones(1, 2),
        torch.ones(1, 2),
    )
    ops.memory_write_(values, slots, coefficients, residuals)
    assert values.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    monkeypatch.setattr("fwpkm.ops._implementation.CHECKED", "1")
    with pytest.raises(ValueError, match=r"slots is in \[1, 3\]; expected slots in \[0, 3\)"):
        ops.memory_write_(values, slots, coefficients, residuals)


@pytest.mark.unpoisoned
def test_same_bits_every_time():
    values, *others = arguments(80)  # 160 entries, two pieces

    def run():
        written = values.clone()
        cuda.forward(written, *others)
        return written

    first = run()
    assert all(torch.equal(first, run()) for _ in range(3))
