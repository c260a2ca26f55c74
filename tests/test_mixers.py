"""Token mixers: windowed attention, and the gated delta net with its convolution, against plain formulas."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softplus
from torch.testing import assert_close
from transformers.cache_utils import Cache
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fwpkm.layers import GatedDeltaNet
from fwpkm.layers.convolution import causal_convolution
from fwpkm.layers.delta_net import DeltaLayer
from fwpkm.layers.mixers import sliding_window_attention
from tests.draws import Draw, seeds
from tests.test_models import make_config


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


def sequences(mask: Tensor, starts: Tensor) -> list[list[int]]:
    """The places of the tokens of each sequence in a row ``[T]``, found one token after the other."""
    found: list[list[int]] = [[]]
    for t in range(len(mask)):
        if mask[t]:
            if starts[t]:
                found.append([])
            found[-1].append(t)
    return found


def draw_mask_and_starts(draw: Draw, masked: bool, packed: bool, length: int) -> tuple[Tensor | None, Tensor | None]:
    mask = draw.uniform(2, length) < 0.6 if masked else None
    starts = draw.uniform(2, length) < 0.3 if packed else None
    if masked and packed:
        starts &= mask
    return mask, starts


def every(mask: Tensor | None, starts: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    return mask, torch.zeros(2, length, dtype=torch.bool) if starts is None else starts


def cut(x: Tensor | None, cuts: set[int]) -> list[Tensor | None]:
    return [None] * (len(cuts) + 1) if x is None else list(x.tensor_split(sorted(cuts), dim=1))


@given(
    seed=seeds,
    width=st.integers(1, 5),
    masked=st.booleans(),
    packed=st.booleans(),
    cuts=st.sets(st.integers(1, 15), max_size=5),
)
def test_convolution_of_each_sequence_by_itself(seed, width, masked, packed, cuts):
    """In pieces, with masked tokens and several sequences a row: each sequence alone, and zero elsewhere."""
    draw = Draw(seed)
    x, weight = draw.normal(2, 16, 3), draw.normal(3, width)
    mask, starts = draw_mask_and_starts(draw, masked, packed, 16)
    past, pieces = None, []
    for piece in zip(cut(x, cuts), cut(mask, cuts), cut(starts, cuts), strict=True):
        y, past = causal_convolution(piece[0], weight, past, *piece[1:])
        pieces.append(y)
    have = torch.cat(pieces, 1)
    mask, starts = every(mask, starts, 16)
    for row in range(2):
        assert torch.equal(have[row, ~mask[row]], torch.zeros_like(have[row, ~mask[row]]))
        for places in sequences(mask[row], starts[row]):
            for i, t in enumerate(places):
                reach = min(i + 1, width)
                want = sum(weight[:, -1 - d] * x[row, places[i - d]] for d in range(reach))
                assert_close(have[row, t], want)


def make_delta_net(seed: int, **options) -> GatedDeltaNet:
    torch.manual_seed(seed)
    layer = GatedDeltaNet(make_config(layer_types=["linear_attention"] * 2, **options), 0)
    layer.dt_bias.data.normal_()
    return layer


def delta_rule_formula(layer: GatedDeltaNet, hidden: Tensor) -> Tensor:
    """Gated delta net of one sequence ``[T, D]`` in float64, token by token and head by head."""
    weights = {name: x.detach().double() for name, x in layer.named_parameters()}
    width, groups = layer.head_v_dim, layer.num_v_heads // layer.num_k_heads
    qkvz = (hidden @ weights["in_proj_qkvz.weight"].T).unflatten(1, (layer.num_k_heads, -1))
    ba = (hidden @ weights["in_proj_ba.weight"].T).unflatten(1, (layer.num_k_heads, -1))
    q, k, v, z = qkvz.split((layer.head_k_dim, layer.head_k_dim, groups * width, groups * width), dim=2)
    b, a = (x.flatten(1) for x in ba.split(groups, dim=2))
    z = z.flatten(1).unflatten(1, (-1, width))
    x = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1)
    kernel = weights["conv1d.weight"][:, 0]
    x = torch.stack(
        [sum(kernel[:, -1 - d] * x[t - d] for d in range(kernel.shape[1]) if d <= t) for t in range(len(x))]
    )
    x = x * torch.sigmoid(x)
    q, k, v = x.split((layer.key_dim, layer.key_dim, layer.value_dim), dim=1)
    q, k, v = (y.unflatten(1, (n, -1)) for y, n in ((q, layer.num_k_heads), (k, layer.num_k_heads), (v, len(b[0]))))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    out = torch.zeros_like(v)
    for head in range(layer.num_v_heads):
        state = torch.zeros(layer.head_k_dim, width, dtype=torch.float64)
        for t in range(len(hidden)):
            rate = weights["A_log"][head].exp() * softplus(a[t, head] + weights["dt_bias"][head])
            query, key = q[t, head // groups], k[t, head // groups]
            state = state * torch.exp(-rate)
            state = state + torch.sigmoid(b[t, head]) * torch.outer(key, v[t, head] - key @ state)
            out[t, head] = query @ state / layer.head_k_dim**0.5
    normed = out / (out.square().mean(-1, keepdim=True) + layer.layer_norm_epsilon).sqrt() * weights["norm.weight"]
    return (normed * z * torch.sigmoid(z)).flatten(1) @ weights["out_proj.weight"].T


@given(
    seed=seeds,
    masked=st.booleans(),
    packed=st.booleans(),
    cuts=st.sets(st.integers(1, 15), max_size=5),
    width=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 4)]),
)
@torch.no_grad()
def test_delta_net_of_each_sequence_by_itself(seed, masked, packed, cuts, width, heads):
    """In pieces, with masked tokens and several sequences a row: the formula, for each sequence alone."""
    options = dict(zip(("linear_num_key_heads", "linear_num_value_heads"), heads, strict=True))
    layer = make_delta_net(seed, linear_conv_kernel_dim=width, **options)
    draw = Draw(seed)
    hidden = draw.normal(2, 16, 16)
    mask, starts = draw_mask_and_starts(draw, masked, packed, 16)
    cache, pieces = Cache(layers=[DeltaLayer()]), []
    for piece in zip(cut(hidden.float(), cuts), cut(mask, cuts), cut(starts, cuts), strict=True):
        pieces.append(layer(piece[0], cache, *piece[1:]))
    have = torch.cat(pieces, 1)
    mask, starts = every(mask, starts, 16)
    for row in range(2):
        for places in sequences(mask[row], starts[row]):
            if places:
                want = delta_rule_formula(layer, hidden[row, places])
                assert_close(have[row, places], want.float(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_delta_net_is_transformers_own_for_whole_sequences():
    """Across chunks of the delta rule, and for sequences that share a row as for one alone."""
    layer = make_delta_net(0)
    hidden = torch.randn(2, 150, 16)
    assert_close(layer(hidden), Qwen3NextGatedDeltaNet.forward(layer, hidden), rtol=1e-4, atol=1e-5)
    lengths = [70, 1, 2, 60, 17]
    starts = torch.zeros(2, 150, dtype=torch.bool)
    starts[:, torch.tensor(lengths).cumsum(0)[:-1]] = True
    want = torch.cat([Qwen3NextGatedDeltaNet.forward(layer, part) for part in hidden.split(lengths, dim=1)], 1)
    assert_close(layer(hidden, starts=starts), want, rtol=1e-3, atol=1e-4)


def test_delta_net_gets_the_gradients_of_one_pass_from_several_calls():
    """The cache is overwritten in place; what an earlier call computed with must stay."""
    layer = make_delta_net(1)
    hidden, upstream = torch.randn(2, 21, 16), torch.randn(2, 21, 16)
    (layer(hidden) * upstream).sum().backward()
    want = {name: x.grad.clone() for name, x in layer.named_parameters()}
    layer.zero_grad()
    cache = Cache(layers=[DeltaLayer()])
    (torch.cat([layer(x, cache) for x in hidden.split([9, 1, 11], dim=1)], 1) * upstream).sum().backward()
    for name, x in layer.named_parameters():
        assert x.grad.abs().sum() > 0, name
        assert_close(x.grad, want[name], rtol=1e-3, atol=1e-4)


def test_delta_net_trains_through_masks_and_packed_rows():
    """No NaN from what a masked token or a boundary does to decays, and no gradient to masked tokens."""
    layer = make_delta_net(2)
    mask, starts = torch.ones(1, 12, dtype=torch.bool), torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [0, 1, 7]], starts[0, [2, 5, 6]] = False, True
    hidden = torch.randn(1, 12, 16, requires_grad=True)
    (layer(hidden, None, mask, starts) * torch.randn(1, 12, 16) * mask.unsqueeze(-1)).sum().backward()
    assert all(x.grad.isfinite().all() for x in layer.parameters())
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, mask)
