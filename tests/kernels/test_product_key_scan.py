"""Chunks whose sub-keys move, on kernels: the float64 CPU operator's addresses, keys and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm.ops.cuda import product_key_scan
from tests.draws import Draw, seeds

OPERATORS = torch.ops.fwpkm.product_key_scan.default, torch.ops.fwpkm.product_key_scan_backward.default


@given(
    seed=seeds,
    memories=st.integers(1, 2),
    steps=st.integers(0, 3),
    tokens=st.integers(1, 4),
    score=st.sampled_from(["idw", "dot"]),
    shared=st.booleans(),
    is_cut=st.booleans(),
)
@pytest.mark.parametrize("k", [2])
def test_scan(k, seed, memories, steps, tokens, score, shared, is_cut):
    draw = Draw(seed, torch.float32)
    query = draw.normal(memories, steps, tokens, 2, 6)
    keys = draw.normal(1 if shared else memories, 2, 2, 4, 3)
    mask = draw.integers(3, memories, steps, tokens) > 0
    cut = draw.integers(2, memories, steps).bool() if is_cut else None
    arguments = (k, 0.5, score, 1e-3)
    have = product_key_scan.forward(query, keys, mask, cut, *arguments)
    want = OPERATORS[0](query.double(), keys.double(), mask, cut, *arguments)
    for a, b in zip(have, want, strict=True):
        assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)
    grads = [draw.normal(*have[i].shape) for i in (0, 2, 4)]
    selected = have[1], have[2], have[3], have[5], mask, cut, 0.5, score
    exact = want[1], want[2], want[3], want[5], mask, cut, 0.5, score
    found = product_key_scan.backward(*grads, query, keys, *selected)
    expected = OPERATORS[1](*(x.double() for x in grads), query.double(), keys.double(), *exact)
    for a, b in zip(found, expected, strict=True):
        assert_close(a.double(), b, rtol=1e-3, atol=float(1e-3 * b.abs().max().clamp_min(1)) if b.numel() else 0)
