"""The language model: streaming, saving, losses, isolation, in transformers' form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from fwpkm.memory import KEY_UPDATES
from fwpkm.models import FwPKMCache, FwPKMConfig, FwPKMForCausalLM
from tests.draws import Draw, seeds

LAYOUTS = st.sampled_from([["sliding_attention"] * 2, ["full_attention"] * 2, ["sliding_attention", "full_attention"]])


def make_config(**options) -> FwPKMConfig:
    return FwPKMConfig(
        **{
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "fwpkm_layers": [0, 1],
            "fwpkm_n_subkeys": 5,
            "fwpkm_key_dim": 6,
            "fwpkm_value_dim": 8,
            "fwpkm_query_conv": 3,
            "fwpkm_topk": 2,
            "fwpkm_chunk_size": 8,
        }
        | options
    )


def make_model(seed: int = 0, **options) -> FwPKMForCausalLM:
    torch.manual_seed(seed)
    return FwPKMForCausalLM(make_config(**options)).eval()


@given(
    seed=seeds, cuts=st.sets(st.integers(1, 29), max_size=6), layout=LAYOUTS, key_update=st.sampled_from(KEY_UPDATES)
)
@torch.no_grad()
def test_streams(seed, cuts, layout, key_update):
    """Any prefill split, down to token by token, gives the logits of one pass."""
    model = make_model(seed, layer_types=layout, fwpkm_key_update=key_update)
    tokens = Draw(seed).integers(32, 2, 30)
    whole = model(tokens).logits
    cache = FwPKMCache(model.config)
    pieces = [model(x, past_key_values=cache).logits for x in tokens.tensor_split(sorted(cuts), dim=1)]
    assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 30


@given(seed=seeds, layout=LAYOUTS)
@torch.no_grad()
def test_isolation(seed, layout):
    """What a sequence gets does not depend on what else is in the batch."""
    model = make_model(seed, layer_types=layout)
    tokens = Draw(seed).integers(32, 3, 20)
    together = model(tokens).logits
    for row in range(3):
        assert_close(model(tokens[row : row + 1]).logits, together[row : row + 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_windowed_attention_equals_transformers_own():
    model = make_model(layer_types=["sliding_attention"] * 2)
    tokens = torch.randint(32, (2, 40))
    assert model.config._attn_implementation == "windowed_sdpa"
    have = model(tokens).logits
    for name in ("sdpa", "eager"):
        model.config._attn_implementation = name
        assert_close(model(tokens).logits, have, rtol=1e-4, atol=1e-5)


def test_loss_is_cross_entropy_of_the_next_token_plus_its_extras():
    tokens = torch.randint(32, (2, 24))
    model = make_model().train()
    out = model(tokens, labels=tokens)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(out.loss, plain)
    assert model(tokens).loss is None

    gated = make_model(fwpkm_gate_weight=0.5).train()
    out = gated(tokens, labels=tokens)
    assert len(out.gates) == 2
    assert_close(out.loss, plain + 0.5 * torch.stack(out.gates).mean())

    slow = make_model(fwpkm_key_update="slow", fwpkm_addressing_weight=0.25).train()
    out = slow(tokens, labels=tokens)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(out.loss, plain + 0.25 * out.addressing_loss)
    out.loss.backward()
    assert slow.blocks[0].memory.keys.grad.abs().sum() > 0


def test_labels_can_be_left_out():
    model = make_model()
    tokens = torch.randint(32, (1, 12))
    labels = tokens.clone()
    labels[:, :6] = -100
    out = model(tokens, labels=labels)
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[0, 5:-1], tokens[0, 6:]))


def test_training_reduces_the_loss():
    model = make_model().train()
    tokens = torch.randint(32, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("key_update", KEY_UPDATES)
@torch.no_grad()
def test_save_and_load(tmp_path, key_update):
    model = make_model(fwpkm_key_update=key_update)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(32, (1, 20))
    want = model(tokens).logits
    for load in (FwPKMForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        assert isinstance(loaded, FwPKMForCausalLM)
        assert torch.equal(loaded(tokens).logits, want)
    loaded = AutoConfig.from_pretrained(tmp_path).to_dict()
    for name, value in model.config.to_dict().items():
        assert name in ("_name_or_path", "transformers_version") or loaded[name] == value
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]


@torch.no_grad()
def test_a_forward_changes_nothing_of_the_model():
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokens = torch.randint(32, (2, 20))
    first, second = model(tokens).logits, model(tokens).logits
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_logits_to_keep_and_use_cache():
    model = make_model()
    tokens = torch.randint(32, (1, 12))
    out = model(tokens, use_cache=True, logits_to_keep=3)
    assert out.logits.shape == (1, 3, 32)
    assert_close(out.logits, model(tokens).logits[:, -3:])
    assert out.past_key_values.get_seq_length() == 12
    assert model(tokens).past_key_values is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fwpkm_layers": [2]}, r"fwpkm_layers is 2; expected a block in \[0, 2\)"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*; expected one for each of 2 blocks"),
        ({"layer_types": ["full_attention", "mamba"]}, "layer_types is 'mamba'; expected 'full_attention' or"),
        ({"sliding_window": None}, "sliding_window is None; expected a number of tokens"),
        ({"fwpkm_write_scale": "large"}, "write_scale is 'large'; expected 'reference' or 'paper' or 'exact'"),
        ({"fwpkm_chunk_size": 0}, "chunk_size is 0; expected an integer >= 1"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_bad_input():
    model = make_model()
    tokens = torch.randint(32, (1, 12))
    with pytest.raises(ValueError, match=r"input_ids.shape is \[12\]; expected \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"input_ids.dtype is torch.float32; expected torch.int64"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"labels.shape is \[1, 11\]; expected \[1, 12\]"):
        model(tokens, labels=tokens[:, 1:])
