"""The memory layer and the convolution."""

from itertools import pairwise

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm import FastWeights, MemoryConfig, fast_weight_memory
from fwpkm.layers import FwPKM
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.layers.fwpkm import zscore
from fwpkm.memory import KEY_UPDATES
from tests.draws import Draw, seeds

pytestmark = pytest.mark.numerical


def make_layer(seed: int = 0, **options) -> FwPKM:
    torch.manual_seed(seed)
    config = options.pop("config", MemoryConfig(topk=2, chunk_size=4))
    return FwPKM(6, n_subkeys=4, key_dim=4, value_dim=5, config=config, **options)


def test_is_the_formula():
    """Section 2.10, written out, over the function that the other tests check."""
    layer = make_layer(heads=2)
    hidden = torch.randn(2, 9, 6)

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * module.weight

    query = rearrange(layer.query(norm(hidden, layer.query_norm)), "b t (h d) -> b t h d", h=2)
    y = layer.value(norm(hidden, layer.value_norm))
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=1).sqrt() + 1e-6)
    gate = torch.sigmoid(layer.gate(norm(hidden, layer.gate_norm)))
    start = FastWeights(layer.keys, layer.values)
    read = fast_weight_memory(query, y, gate[..., 0], start, layer.config).output
    mixed = gate * read + (1 - gate) * y
    want = hidden + layer.output(norm(mixed, layer.output_norm))
    assert_close(layer(hidden)[0], want)


def test_zscore_of_a_constant_is_zero():
    assert torch.equal(zscore(torch.full((3, 4), 2.5)), torch.zeros(3, 4))


@given(
    seed=seeds,
    cuts=st.sets(st.integers(1, 19), max_size=6),
    query_conv=st.sampled_from([0, 1, 3, 8]),
    key_update=st.sampled_from(KEY_UPDATES),
    heads=st.integers(1, 2),
)
def test_streams(seed, cuts, query_conv, key_update, heads):
    """However a sequence is cut, the layer gives the same: memory and convolutions continue."""
    config = MemoryConfig(topk=2, chunk_size=4, key_update=key_update)
    layer = make_layer(seed, query_conv=query_conv, heads=heads, config=config)
    hidden = Draw(seed, torch.float32).normal(2, 20, 6)
    whole = layer(hidden).hidden
    state, pieces = None, []
    for piece in hidden.tensor_split(sorted(cuts), dim=1):
        out, state, *_ = layer(piece, state)
        pieces.append(out)
    assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@given(
    seed=seeds,
    cuts=st.sets(st.integers(1, 19), max_size=12),
    query_conv=st.sampled_from([0, 1, 4]),
    masked=st.booleans(),
    packed=st.booleans(),
)
@torch.no_grad()
def test_masked_and_packed_rows_stream(seed, cuts, query_conv, masked, packed):
    """However they are cut: each sequence of a row gives what its unmasked tokens give alone."""
    layer = make_layer(seed, query_conv=query_conv).double()
    draw = Draw(seed)
    hidden = draw.normal(2, 20, 6)
    mask = draw.uniform(2, 20) < 0.7 if masked else None
    starts = draw.uniform(2, 20) < 0.2 if packed else None
    if mask is not None and starts is not None:
        starts &= mask
    state, pieces, bounds = None, [], sorted({0, *cuts, 20})
    for first, last in pairwise(bounds):
        options = [None if x is None else x[:, first:last] for x in (mask, starts)]
        out, state, *_ = layer(hidden[:, first:last], state, *options)
        pieces.append(out)
    have = torch.cat(pieces, 1)
    sequence = torch.zeros(2, 20).long() if starts is None else starts.cumsum(1)
    real = torch.ones(2, 20).bool() if mask is None else mask
    for row in range(2):
        for number in sequence[row].unique():
            tokens = real[row] & (sequence[row] == number)
            if tokens.any():
                assert_close(have[row, tokens], layer(hidden[row, tokens].unsqueeze(0))[0][0], rtol=1e-4, atol=1e-6)


@given(seed=seeds, width=st.integers(1, 9))
def test_convolution_is_causal_and_of_its_width(seed, width):
    draw = Draw(seed)
    conv = CausalConvolution(3, width).double()
    x = draw.normal(2, 12, 3)
    padded = torch.cat((torch.zeros(2, width - 1, 3), x), 1)
    want = x + sum(padded[:, i : i + 12] * conv.weight[:, i] for i in range(width))
    assert_close(conv(x), want)


LEARNED = pytest.mark.parametrize("learned", [False, True])


@LEARNED
@pytest.mark.parametrize("key_update", KEY_UPDATES)
def test_fast_weights_stay_float32_through_casts(key_update, learned):
    layer = make_layer(config=MemoryConfig(topk=2, chunk_size=4, key_update=key_update), learn_initial_values=learned)
    before = layer.keys.clone(), layer.values.clone()
    for cast in (layer.bfloat16, layer.half, lambda: layer.to(torch.bfloat16)):
        cast()
        assert layer.keys.dtype == layer.values.dtype == torch.float32
        assert torch.equal(layer.keys, before[0])
        assert torch.equal(layer.values, before[1])
    assert layer.query.weight.dtype == torch.bfloat16
    assert layer(torch.randn(1, 6, 6, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert isinstance(layer.keys, torch.nn.Parameter) == (key_update == "slow")
    assert isinstance(layer.values, torch.nn.Parameter) == learned
    assert layer.double().keys.dtype == torch.float64


@LEARNED
@pytest.mark.parametrize("key_update", KEY_UPDATES)
def test_a_forward_writes_no_buffer_and_every_parameter_gets_a_gradient(key_update, learned):
    config = MemoryConfig(topk=2, chunk_size=4, key_update=key_update)
    layer = make_layer(query_conv=3, config=config, learn_initial_values=learned)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    result = layer(torch.randn(2, 12, 6))
    (result.hidden.square().sum() + result.memory.addressing_loss).backward()
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@given(seed=seeds, split=st.integers(1, 10))
def test_learned_initial_values_get_the_gradient_of_finite_differences(seed, split):
    """Through reads and commits, of one call or two: a step along any direction changes the output by the slope."""
    layer = make_layer(seed, learn_initial_values=True).double()
    draw = Draw(seed)
    hidden, upstream, direction = draw.normal(2, 11, 6), draw.normal(2, 11, 6), draw.normal(16, 5)

    def loss() -> torch.Tensor:
        first, state, *_ = layer(hidden[:, :split])
        return (torch.cat((first, layer(hidden[:, split:], state)[0]), 1) * upstream).sum()

    loss().backward()
    sides = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            layer.values += step * direction
            sides.append(loss())
    assert_close((layer.values.grad * direction).sum(), (sides[0] - sides[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_learned_initial_values_do_not_keep_a_long_log_from_folding():
    """A parameter always requires a gradient; where none is recorded the state stays bounded all the same."""
    layer = make_layer(learn_initial_values=True)
    hidden = torch.randn(1, 400, 6)
    want, kept, *_ = layer(hidden)
    with torch.no_grad():
        have, folded, *_ = layer(hidden[:, :200])
        rest, folded, *_ = layer(hidden[:, 200:], folded)
    assert kept.memory.own_values is None
    assert folded.memory.own_values is not None
    assert_close(torch.cat((have, rest), 1), want, rtol=1e-4, atol=1e-4)


def test_slow_keys_learn_from_the_addressing_loss_and_queries_do_not():
    layer = make_layer(config=MemoryConfig(topk=2, chunk_size=4, key_update="slow"))
    layer(torch.randn(2, 8, 6)).memory.addressing_loss.backward()
    assert layer.keys.grad.abs().sum() > 0
    assert not layer.query.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dim": 5}, "key_dim is 5; expected a positive even number"),
        ({"n_subkeys": 4, "config": MemoryConfig(topk=5)}, r"config.topk is 5; expected at most n_subkeys \(4\)"),
        ({"heads": 0}, "heads is 0; expected a positive integer"),
        ({"query_conv": -1}, "query_conv is -1; expected a width, or 0"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive integer"),
        ({"value_dim": 0}, "value_dim is 0; expected a positive integer"),
    ],
)
def test_bad_layer(options, message):
    with pytest.raises(ValueError, match=message):
        FwPKM(**{"hidden_size": 6, "n_subkeys": 8, "key_dim": 4, "value_dim": 4} | options)


def test_bad_input():
    layer, hidden = make_layer(query_conv=3), torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"hidden.shape is \[2, 6\]; expected \[B, T, 6\]"):
        layer(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"mask.shape is \[2, 4\]; expected \[2, 5\]"):
        layer(hidden, mask=torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match=r"starts.dtype is torch.float32; expected torch.bool"):
        layer(hidden, starts=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="query or keys holds NaN; expected numbers"):
        layer(hidden * torch.nan)
    with pytest.raises(ValueError, match=r"query.shape\[0\] is 1; expected 2, the batch of the state"):
        make_layer()(hidden[:1], make_layer()(hidden)[1])
