"""Layers of flash-linear-attention as token mixers, with a stand-in for the package, whose kernels need a GPU."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from tests.test_models import make_config, make_model

LAYOUT = {"layer_types": ["fla:Mean", "sliding_attention"], "fwpkm_layers": [1]}


class Mean(nn.Module):
    """A causal mean of unmasked tokens, with the signature of a layer of ``fla.layers``."""

    def __init__(self, hidden_size=1024, num_heads=4, layer_idx=None, **kwargs):
        super().__init__()
        self.made_with = {"num_heads": num_heads, "layer_idx": layer_idx, **kwargs}
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        assert past_key_values is None
        seen = torch.ones_like(hidden_states[..., :1])
        if attention_mask is not None:
            assert attention_mask.shape == hidden_states.shape[:2]  # fla's own demand, 0 or 1
            seen = seen * attention_mask.unsqueeze(-1)
        mean = (hidden_states * seen).cumsum(1) / seen.cumsum(1).clamp(min=1)
        return self.proj(mean), None, past_key_values


class Tensors(Mean):
    """Some layers return the tensor alone, and know no ``layer_idx``."""

    def __init__(self, hidden_size=1024):
        super().__init__(hidden_size)

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)[0]


@pytest.fixture(autouse=True)
def package(monkeypatch):
    package, layers = ModuleType("fla"), ModuleType("fla.layers")
    package.layers, layers.Mean, layers.Tensors, layers.mean = layers, Mean, Tensors, torch.mean
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.layers", layers)


def test_a_layer_is_built_and_reads():
    """With its options, in its block; masked tokens are skipped, and what comes later is not seen."""
    model = make_model(**LAYOUT, fla_options={"Mean": {"num_heads": 2, "expand": 3}})
    mixer = model.model.layers[0].linear_attn
    assert isinstance(mixer.layer, Mean)
    assert mixer.layer.made_with == {"num_heads": 2, "layer_idx": 0, "expand": 3}
    hidden, mask = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(mixer(hidden), mixer.layer(hidden)[0])
    mask[0, [0, 4]] = False
    assert_close(mixer(hidden, mask=mask)[0, mask[0]], mixer(hidden[:1, mask[0]])[0])
    tokens = torch.randint(32, (2, 20))
    assert_close(model(tokens).logits[:, :11], model(tokens[:, :11]).logits, rtol=1e-4, atol=1e-5)


def test_a_layer_that_returns_a_tensor():
    model = make_model(layer_types=["sliding_attention", "fla:Tensors"])
    assert model(torch.randint(32, (2, 20)), attention_mask=torch.ones(2, 20)).logits.isfinite().all()


def test_a_model_trains_is_saved_and_generates(tmp_path):
    model = make_model(**LAYOUT, fla_options={"Mean": {"num_heads": 2}})
    tokens = torch.randint(32, (2, 20))
    model(tokens, labels=tokens).loss.backward()
    assert model.model.layers[0].linear_attn.layer.proj.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = FwPKMForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_types == LAYOUT["layer_types"]
    assert loaded.config.fla_options == {"Mean": {"num_heads": 2}}
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    out = loaded.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(out[:, 20], model(tokens).logits[:, -1].argmax(-1))


def test_what_it_does_not_do_is_refused():
    """A cache, and several sequences in a row, which the layer would mix."""
    model, tokens = make_model(**LAYOUT), torch.randint(32, (2, 20))
    message = "use_cache is True; expected False with layer type 'fla:Mean'"
    with pytest.raises(ValueError, match=message):
        model(tokens, use_cache=True)
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, max_new_tokens=3)
    with pytest.raises(ValueError, match="starts is given; expected None: fla:Mean takes one sequence a row"):
        model(tokens, position_ids=(torch.arange(20) % 7).unsqueeze(0))
    cache = FwPKMCache(make_config())
    with pytest.raises(ValueError, match="past_key_values is FwPKMCache; expected None: fla:Mean"):
        model.model.layers[0].linear_attn(torch.randn(2, 3, 16), cache)


@pytest.mark.parametrize("name", ["Mediant", "mean"])
def test_an_unknown_layer_is_refused(name):
    with pytest.raises(ValueError, match=f"layer_types is 'fla:{name}'; expected a layer of fla.layers after 'fla:'"):
        make_model(layer_types=[f"fla:{name}", "full_attention"])


def test_configurations_are_checked():
    with pytest.raises(ValueError, match=r"layer_types is 'fla:a\.b'; expected a layer's name after 'fla:'"):
        make_config(layer_types=["fla:a.b", "full_attention"])
    with pytest.raises(ValueError, match=r"layer_types is 'mean'; expected 'full_attention' or .* or 'fla:<layer>'"):
        make_config(layer_types=["mean", "full_attention"])
    with pytest.raises(ValueError, match=r"fla_options is Max; expected a layer that layer_types names: \['Mean'\]"):
        make_config(**LAYOUT, fla_options={"Max": {}})
    with pytest.raises(ValueError, match="fla_options is Max; expected a layer that layer_types names: none"):
        make_config(fla_options={"Max": {}})


def test_without_the_package(monkeypatch):
    """A configuration needs none; a model says which layer needs it, and how to get it."""
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.delitem(sys.modules, "fla.layers")
    make_config(**LAYOUT)
    with pytest.raises(RuntimeError, match=r"layer type 'fla:Mean' is a layer of .* pip install 'fwpkm\[fla\]'"):
        make_model(**LAYOUT)
