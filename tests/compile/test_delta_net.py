"""Gated delta nets in graphs: one for every length, in which the delta rule is one operator."""

import pytest
import torch
from torch.testing import assert_close
from transformers.cache_utils import Cache

from fwpkm.layers.delta_net import DeltaLayer
from tests.test_mixers import make_delta_net
from tests.test_models import make_model


class Graphs:
    """A backend that keeps what it is given: how many graphs there were, and how often each calls the rule."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, graph, inputs):
        self.calls.append(sum(node.target is torch.ops.fwpkm.gated_delta_rule.default for node in graph.graph.nodes))
        return graph.forward


def placements(length: int) -> dict[str, dict[str, torch.Tensor]]:
    mask = torch.ones(2, length)
    mask[0, :3] = mask[1, 2] = 0
    return {
        "plain": {},
        "padded": {"attention_mask": mask},
        "packed": {"position_ids": (torch.arange(length) % 13).unsqueeze(0)},
    }


@pytest.mark.parametrize("placement", ["plain", "padded", "packed"])
def test_model_is_one_graph_for_every_length(placement):
    """A hybrid model, at lengths of several chunks: no graph after the second length, one call of the rule a layer."""
    model = make_model(layer_types=["linear_attention", "sliding_attention"], fwpkm_layers=[]).train()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for length in (70, 130, 200, 67, 99):
        tokens = torch.randint(32, (2, length))
        options = placements(length)[placement]
        assert_close(compiled(tokens, **options).logits, model(tokens, **options).logits, rtol=1e-4, atol=1e-5)
    assert graphs.calls == [1, 1]


def test_gradients_of_a_graph_for_every_length():
    torch._dynamo.utils.counters.clear()
    layer = make_delta_net(0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for length in (70, 130, 5, 67):
        hidden, upstream = torch.randn(2, length, 16), torch.randn(2, length, 16)
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            (call(hidden) * upstream).sum().backward()
            results.append([x.grad.clone() for x in layer.parameters()])
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@torch.no_grad()
def test_pieces_of_any_length_with_a_cache():
    """The states' cache is written within the graph: one for a first piece, and one or two for those that follow."""
    torch._dynamo.utils.counters.clear()
    layer, hidden = make_delta_net(1), torch.randn(2, 300, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want, cache, pieces = layer(hidden), Cache(layers=[DeltaLayer()]), []
    lengths = [70, 80, 5, 65, 33, 47]
    counts = []
    for piece in hidden.split(lengths, dim=1):
        pieces.append(compiled(piece, cache))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert_close(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-5)
    assert counts[2:] == [counts[2]] * 4
    assert counts[2] <= 3


@pytest.mark.unpoisoned
def test_inductor():
    """The code that it generates around the operator, forward and backward, for more than one length."""
    layer = make_delta_net(2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (70, 9):
        hidden = torch.randn(2, length, 16)
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            out = call(hidden)
            out.square().sum().backward()
            results.append([out.detach(), *(x.grad.clone() for x in layer.parameters())])
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
