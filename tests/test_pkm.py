"""The slow product-key memory, against a softmax over the best of all slots."""

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.testing import assert_close

from fwpkm.layers import ProductKeyMemory
from fwpkm.ops import memory_read, product_key_address
from tests.draws import Draw, seeds
from tests.test_models import make_model

# Values further apart than the scores of two slots: taking another slot shows.
WIDE = 10.0


def make_layer(seed: int = 0, **options) -> ProductKeyMemory:
    torch.manual_seed(seed)
    layer = ProductKeyMemory(
        **{"hidden_size": 6, "n_subkeys": 5, "key_dim": 4, "value_dim": 3, "heads": 2, "topk": 2} | options
    )
    layer.values.data.mul_(WIDE)
    return layer


def dense_formula(layer: ProductKeyMemory, hidden: Tensor) -> Tensor:
    """All ``n * n`` scores of a head, softmax over the best ``k``, sum over heads, gate, output."""
    half = layer.keys.shape[3]
    query = rearrange(hidden @ layer.query.weight.T, "b t (h c d) -> b t h c d", h=layer.heads, d=half)
    first, second = (query[..., c, None, :] * layer.keys[:, c] for c in (0, 1))
    scores = (first.sum(-1).unsqueeze(-1) + second.sum(-1).unsqueeze(-2)).flatten(-2)
    order = scores.argsort(-1, descending=True)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., : layer.topk], True)
    weights = torch.where(best, scores, -torch.inf).softmax(-1).sum(2)
    gate = hidden @ layer.gate.weight.T
    return (weights @ layer.values * gate * torch.sigmoid(gate)) @ layer.output.weight.T


@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 3), st.integers(0, 6), st.integers(1, 7)),
    n_subkeys=st.integers(1, 7),
    heads=st.integers(1, 3),
    data=st.data(),
)
def test_is_the_dense_formula(seed, sizes, n_subkeys, heads, data):
    topk = data.draw(st.integers(1, n_subkeys))
    layer = make_layer(seed, hidden_size=sizes[2], n_subkeys=n_subkeys, heads=heads, topk=topk).double()
    hidden = Draw(seed).normal(*sizes)
    assert_close(layer(hidden), dense_formula(layer, hidden))


@given(seed=seeds)
def test_gradients_are_finite_differences(seed):
    layer = make_layer(seed, hidden_size=3, n_subkeys=3).double()
    hidden = Draw(seed).normal(1, 4, 3).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (hidden,))

    assert torch.autograd.gradcheck(call, (hidden, *parameters))


def addressed(layer: ProductKeyMemory, hidden: Tensor) -> Tensor:
    query = rearrange(layer.query(hidden), "b t (h d) -> 1 (b t) h d", h=layer.heads)
    return product_key_address(query.float(), layer.keys.unsqueeze(0), layer.topk, score="dot")[1]


def test_values_get_gradients_at_addressed_rows_only():
    layer = make_layer(n_subkeys=20)
    hidden = torch.randn(2, 7, 6)
    layer(hidden).square().sum().backward()
    touched = layer.values.grad.abs().sum(-1) > 0
    assert torch.equal(touched.nonzero().flatten(), addressed(layer, hidden).unique())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_addresses_and_reads_in_float32(dtype):
    """Cast, or under autocast: the query is rounded, what the memory makes of it is not."""
    layer, half = make_layer(n_subkeys=20), make_layer(n_subkeys=20).to(dtype)
    hidden = torch.randn(2, 30, 6)
    with torch.autocast("cpu", dtype):
        under_autocast = layer(hidden)
        assert under_autocast.dtype == dtype
    cast = half(hidden.to(dtype))
    assert cast.dtype == dtype
    for x, outer in ((under_autocast, hidden), (cast, hidden.to(dtype))):
        query = half.query(hidden.to(dtype)).float().view(1, 60, 2, 4)
        scores, slots, _, _ = product_key_address(query, layer.keys.unsqueeze(0), 2, score="dot")
        read = memory_read(layer.values, slots.flatten(-2), scores.softmax(-1).flatten(-2)).view(2, 30, 3)
        gated = read.to(outer.dtype) * torch.nn.functional.silu(half.gate(hidden.to(dtype)))
        assert torch.equal(x, half.output(gated.to(dtype)))


def test_weights_stay_float32_with_their_gradients():
    layer = make_layer()
    layer(torch.randn(2, 7, 6)).sum().backward()
    before = [x.clone() for x in (layer.keys, layer.values, layer.keys.grad, layer.values.grad)]
    layer.bfloat16()
    assert layer.query.weight.grad.dtype == torch.bfloat16
    for have, want in zip((layer.keys, layer.values, layer.keys.grad, layer.values.grad), before, strict=True):
        assert have.dtype == torch.float32
        assert torch.equal(have, want)
    assert layer.double().values.dtype == torch.float64


def test_trains_in_a_language_model():
    """Loss goes down, and a step's gradient is about the rows that its tokens addressed."""
    model = make_model(pkm_layers=[0, 1], fwpkm_layers=[], pkm_n_subkeys=16).train()
    tokens = torch.randint(32, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    inputs = {}
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0].detach()}))
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for layer, hidden in inputs.items():
            touched = torch.zeros(256, dtype=torch.bool).index_fill(0, addressed(layer, hidden).flatten(), True)
            assert not layer.values.grad[~touched].any()
            assert layer.values.grad[touched].any()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dim": 5}, "key_dim is 5; expected a positive even number"),
        ({"topk": 9}, r"topk is 9; expected 1 <= topk <= n_subkeys \(8\)"),
        ({"topk": 0}, r"topk is 0; expected 1 <= topk <= n_subkeys \(8\)"),
        ({"heads": 0}, "heads is 0; expected a positive integer"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive integer"),
        ({"n_subkeys": 0}, "n_subkeys is 0; expected a positive integer"),
        ({"value_dim": 0}, "value_dim is 0; expected a positive integer"),
    ],
)
def test_bad_layer(options, message):
    with pytest.raises(ValueError, match=message):
        ProductKeyMemory(**{"hidden_size": 6, "n_subkeys": 8, "key_dim": 4, "value_dim": 4, "topk": 2} | options)


def test_bad_hidden():
    with pytest.raises(ValueError, match=r"hidden.shape is \[2, 6\]; expected \[B, T, 6\]"):
        make_layer()(torch.randn(2, 6))
