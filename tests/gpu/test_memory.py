"""The memory, the layer and the model on a GPU: the reference's numbers, and the laws that need no oracle."""

import pytest
import torch
from torch.testing import assert_close

from fwpkm import FastWeights, MemoryConfig, fast_weight_memory, reference
from fwpkm.layers import FwPKM
from tests.test_functional import draw_inputs
from tests.test_packing import flags

pytestmark = pytest.mark.gpu
CONFIGS = [
    MemoryConfig(topk=3, chunk_size=8, key_update=keys, write_scale=scale, scope=scope, learning_rate=0.5)
    for keys, scale, scope in (
        ("fast", "reference", "sequence"),
        ("fast", "exact", "shared"),
        ("slow", "exact", "sequence"),
        ("train_only", "paper", "shared"),
    )
]


def case(seed: int, length: int = 40):
    """Inputs in float32 without near ties, on the GPU, and as they are there in float64."""
    inputs = draw_inputs(seed, 2, length, 2, 6).to(torch.float32)
    return inputs, inputs.to(torch.float64)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("masked", [None, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_and_gradients_are_the_references(config, masked, seed):
    inputs, exact = case(seed)
    mask = flags(seed, masked, 2, 40)
    leaves = exact.leaves()
    want = reference.fast_weight_memory(*leaves, config, mask=mask, training=True)
    here = type(inputs)(*(x.cuda().requires_grad_() for x in inputs))
    mask = None if mask is None else mask.cuda()
    have = fast_weight_memory(*here[:3], here.weights, config, mask=mask, training=True)
    same = have.slots.cpu() == want.slots
    assert same.all(), f"{(~same).float().mean():.2%} of slots differ: a near tie in this seed"
    assert_close(have.output.cpu().double(), want.output, rtol=1e-4, atol=1e-4)
    cotangent = torch.randn_like(want.output)
    expected = torch.autograd.grad((want.output * cotangent).sum(), leaves, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(
        (have.output * cotangent.cuda().float()).sum(), here, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a.cpu().double(), b, rtol=1e-3, atol=float(1e-3 * b.abs().max().clamp_min(1)))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_stream_is_one_pass(config):
    inputs = type(case(0)[0])(*(x.cuda() for x in case(0)[0]))
    with torch.no_grad():
        whole = fast_weight_memory(*inputs[:3], inputs.weights, config)
        memory, outputs = inputs.weights, []
        for start, stop in ((0, 5), (5, 6), (6, 30), (30, 40)):
            result = fast_weight_memory(*inputs.tokens(start, stop), memory, config)
            memory = result.state
            outputs.append(result.output)
    assert_close(torch.cat(outputs, 1), whole.output, rtol=1e-5, atol=1e-5)


def test_sequences_do_not_see_each_other():
    inputs = type(case(1)[0])(*(x.cuda() for x in case(1)[0]))
    config = CONFIGS[0]
    with torch.no_grad():
        both = fast_weight_memory(*inputs[:3], inputs.weights, config).output
        alone = fast_weight_memory(*inputs.rows(slice(1, 2))[:3], inputs.weights, config).output
    assert_close(both[1:], alone)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_queries_are_as_good_as_converted(config, dtype):
    """In pieces too: whole chunks go through one operator, the rest of an open chunk through others."""
    inputs = type(case(2)[0])(*(x.cuda() for x in case(2)[0]))
    half = inputs._replace(query=inputs.query.to(dtype))
    outputs = []
    with torch.no_grad():
        for given in (half, half._replace(query=half.query.float())):
            first = fast_weight_memory(*given.tokens(0, 21), given.weights, config, training=True)
            second = fast_weight_memory(*given.tokens(21, 40), first.state, config, training=True)
            outputs.append(torch.cat((first.output, second.output), 1))
    assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


def test_a_layer_trains_in_bfloat16():
    torch.manual_seed(0)
    layer = FwPKM(32, n_subkeys=8, key_dim=8, value_dim=24, config=CONFIGS[0]).cuda().bfloat16()
    hidden = torch.randn(2, 40, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = layer(hidden).hidden
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.values.dtype == torch.float32
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().sum() > 0


def test_weights_and_state_on_different_devices_are_refused():
    inputs = case(0)[0]
    weights = FastWeights(inputs.keys.cuda(), inputs.values.cuda())
    with pytest.raises((ValueError, RuntimeError), match="device"):
        fast_weight_memory(*inputs[:3], weights, CONFIGS[0])
