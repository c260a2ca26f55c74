"""The memory layer, the convolution and the windowed attention."""

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from fwpkm import FastWeights, MemoryConfig, fast_weight_memory
from fwpkm.layers import FwPKM
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.layers.fwpkm import zscore
from fwpkm.layers.mixers import sliding_window_attention
from fwpkm.memory import KEY_UPDATES
from tests.draws import Draw, seeds


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
    whole, _ = layer(hidden)
    state, pieces = None, []
    for piece in hidden.tensor_split(sorted(cuts), dim=1):
        out, state = layer(piece, state)
        pieces.append(out)
    assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@given(seed=seeds, width=st.integers(1, 9))
def test_convolution_is_causal_and_of_its_width(seed, width):
    draw = Draw(seed)
    conv = CausalConvolution(3, width).double()
    x = draw.normal(2, 12, 3)
    padded = torch.cat((torch.zeros(2, width - 1, 3), x), 1)
    want = x + sum(padded[:, i : i + 12] * conv.weight[:, i] for i in range(width))
    assert_close(conv(x), want)


def test_fast_weights_stay_float32_through_casts():
    for key_update in KEY_UPDATES:
        layer = make_layer(config=MemoryConfig(topk=2, chunk_size=4, key_update=key_update))
        before = layer.keys.clone(), layer.values.clone()
        for cast in (layer.bfloat16, layer.half, lambda layer=layer: layer.to(torch.bfloat16)):
            cast()
            assert layer.keys.dtype == layer.values.dtype == torch.float32
            assert torch.equal(layer.keys, before[0])
            assert torch.equal(layer.values, before[1])
        assert layer.query.weight.dtype == torch.bfloat16
        assert layer(torch.randn(1, 6, 6, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
        assert isinstance(layer.keys, torch.nn.Parameter) == (key_update == "slow")


def test_a_forward_writes_no_buffer_and_every_parameter_gets_a_gradient():
    for key_update in KEY_UPDATES:
        layer = make_layer(query_conv=3, config=MemoryConfig(topk=2, chunk_size=4, key_update=key_update))
        before = {name: x.clone() for name, x in layer.named_buffers()}
        result = layer.read_and_write(torch.randn(2, 12, 6))
        (result.hidden.square().sum() + result.memory.addressing_loss).backward()
        assert all(torch.equal(x, before[name]) for name, x in layer.named_buffers())
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_slow_keys_learn_from_the_addressing_loss_and_queries_do_not():
    layer = make_layer(config=MemoryConfig(topk=2, chunk_size=4, key_update="slow"))
    layer.read_and_write(torch.randn(2, 8, 6)).memory.addressing_loss.backward()
    assert layer.keys.grad.abs().sum() > 0
    assert layer.query.weight.grad is None


@given(
    seed=seeds,
    length=st.integers(1, 20),
    past=st.integers(0, 12),
    window=st.integers(1, 8),
    heads=st.integers(1, 2),
)
def test_sliding_window_attention_is_masked_attention(seed, length, past, window, heads):
    """Block by block equals a mask over the whole context, also behind a cache that is longer than the window."""
    draw = Draw(seed)
    query = draw.normal(2, heads, length, 4)
    key, value = draw.normal(2, heads, past + length, 4), draw.normal(2, heads, past + length, 4)
    distance = torch.arange(past, past + length)[:, None] - torch.arange(past + length)
    mask = (distance >= 0) & (distance < window)
    want = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    assert_close(sliding_window_attention(query, key, value, window, 0.3), want)


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


def test_bad_hidden():
    with pytest.raises(ValueError, match=r"hidden.shape is \[2, 6\]; expected \[B, T, 6\]"):
        make_layer()(torch.randn(2, 6))
