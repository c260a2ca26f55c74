"""``fast_weight_memory`` with queries, targets and gates in half precision: what it makes of the converted ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm import FastWeights, MemoryConfig, MemoryState, fast_weight_memory
from tests.draws import seeds
from tests.test_functional import OVERSHOT, configs, dense, draw_inputs, sizes
from tests.test_packing import flags, run

pytestmark = pytest.mark.numerical

halves = st.sampled_from([torch.bfloat16, torch.float16])


@given(
    config=configs,
    seed=seeds,
    dtype=halves,
    masked=st.sampled_from([None, None, 0.7]),
    restarts=st.sampled_from([None, None, 0.15]),
    cuts=st.lists(st.integers(1, 19), max_size=4),
    training=st.booleans(),
    **sizes,
)
def test_as_converted(config, seed, dtype, masked, restarts, cuts, training, **size):
    """In one call and in pieces: the same bits, a state in the dtype of the fast weights, gradients rounded last."""
    inputs = draw_inputs(seed, **size).to(torch.float32)
    half = inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in ("query", "target", "gate")})
    cuts = [c for c in cuts if c < size["length"]]
    shape = size["batch"], size["length"]
    reset = None if config.scope == "shared" else flags(seed + 1, restarts, *shape)
    options = {"training": training, "mask": flags(seed, masked, *shape), "reset": reset}
    found = []
    for given_ in (half, half.to(torch.float32)):
        leaves = given_.leaves()
        output, last = run(leaves, config, cuts, **options)
        grads = torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        found.append((output, last.state.detach(), grads))
    (output, state, grads), (want, want_state, want_grads) = found
    assert torch.equal(output, want)
    assert torch.equal(dense(state), dense(want_state))
    assert torch.equal(state.keys, want_state.keys)
    for a, b in zip(*(x.open.columns() if x.open else [] for x in (state, want_state)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b, leaf in zip(grads, want_grads, half, strict=True):
        assert a.dtype == leaf.dtype
        if want.abs().max() < OVERSHOT and b.isfinite().all():
            eps = torch.finfo(dtype).eps
            assert_close(a.float(), b, rtol=eps, atol=float(eps * b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_queries_are_saved_and_continued(dtype, tmp_path):
    """An open chunk's queries are kept in float32, so that a state does not know in what they came."""
    config = MemoryConfig(topk=2, chunk_size=8)
    inputs = draw_inputs(0, 2, 20, 1, 4).to(torch.float32)
    half = inputs._replace(query=inputs.query.to(dtype))
    weights = FastWeights(inputs.keys, inputs.values)
    with torch.no_grad():
        whole = fast_weight_memory(*half[:3], weights, config).output
        state = fast_weight_memory(*half.tokens(0, 13), weights, config).state
        assert state.open.tensors[2].dtype == torch.float32
        state.save(tmp_path / "state")
        loaded = MemoryState.load(tmp_path / "state", weights)
        for query in (half.query, half.query.float()):
            rest = half._replace(query=query)
            again = fast_weight_memory(*rest.tokens(13, 20), loaded, config)
            assert_close(again.output, whole[:, 13:], rtol=1e-5, atol=1e-5)
