"""Histograms of gates against one forward."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fwpkm.evaluation.gates import gates
from tests.draws import seeds
from tests.evaluation.tiny import model, tokens


@given(seeds, st.integers(1, 3), st.integers(1, 60), st.integers(1, 70))
def test_gates(seed, rows, length, call):
    net = model(seed)
    read = torch.from_numpy(tokens(seed, rows, length))
    have = gates(net, read, call)
    with torch.no_grad():
        want = net(read.long(), output_memories=True).gates
    assert [layer["block"] for layer in have] == [0, 1]
    for layer, gate in zip(have, want, strict=True):
        values = gate.numpy().flatten()
        assert layer["mean"] == pytest.approx(values.mean(), abs=1e-4)
        shares = np.histogram(values, bins=20, range=(0, 1))[0] / values.size
        near_an_edge = (np.abs(values * 20 - np.round(values * 20)) < 1e-2).mean()
        assert np.abs(np.array(layer["histogram"]) - shares).max() <= near_an_edge + 1e-9
        assert sum(layer["histogram"]) == pytest.approx(1)


def test_an_open_gate_is_counted():
    net = model(fwpkm_layers=[1])
    with torch.no_grad():
        net.model.layers[1].memory.gate.bias.fill_(100.0)
    layer = gates(net, torch.from_numpy(tokens(0, 2, 9)))[0]
    assert layer["histogram"] == [0.0] * 19 + [1.0]
    assert (layer["block"], layer["mean"]) == (1, 1)


def test_no_memory():
    with pytest.raises(ValueError, match=r"model.config.fwpkm_layers is \[\]; expected a block with a memory"):
        gates(model(fwpkm_layers=[]), torch.zeros(1, 5))
