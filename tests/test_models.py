"""The language model in transformers' form: saving, losses, graphs, what it refuses."""

import math

import pytest
import torch
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from fwpkm.memory import KEY_UPDATES
from fwpkm.models import FwPKMCache, FwPKMConfig, FwPKMForCausalLM

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIXERS = [[SLIDING] * 2, [FULL] * 2, [LINEAR] * 2, [SLIDING, FULL], [LINEAR, SLIDING], [FULL, LINEAR]]
LAYOUTS = st.fixed_dictionaries(
    {"layer_types": st.sampled_from(MIXERS), "pkm_layers": st.sampled_from([[], [0], [0, 1]])}
)


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
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 8,
            "fwpkm_layers": [0, 1],
            "fwpkm_n_subkeys": 5,
            "fwpkm_key_dim": 6,
            "fwpkm_value_dim": 8,
            "fwpkm_query_conv": 3,
            "fwpkm_topk": 2,
            "fwpkm_chunk_size": 8,
            "pkm_n_subkeys": 5,
            "pkm_key_dim": 6,
            "pkm_value_dim": 8,
            "pkm_heads": 2,
            "pkm_topk": 3,
        }
        | options
    )


def make_model(seed: int = 0, **options) -> FwPKMForCausalLM:
    torch.manual_seed(seed)
    return FwPKMForCausalLM(make_config(**options)).eval()


@pytest.mark.parametrize("layout", [[LINEAR, SLIDING], [FULL, SLIDING]])
@pytest.mark.parametrize("placement", ["plain", "padded", "packed"])
def test_one_graph(layout, placement):
    """Forward and backward are captured without a break, and give what eager gives."""
    model = make_model(layer_types=layout, pkm_layers=[0], fwpkm_layers=[]).train()
    tokens, mask = torch.randint(32, (2, 20)), torch.ones(2, 20)
    mask[0, :7] = 0
    positions = (torch.arange(20) % 13).unsqueeze(0)
    options = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": positions}}[placement]
    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        out = call(tokens, labels=tokens, **options)
        model.zero_grad()
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_positions_are_those_given_and_a_mask_of_ones_is_none():
    model = make_model(fwpkm_layers=[])
    tokens = torch.randint(32, (2, 20))
    want = model(tokens).logits
    assert torch.equal(model(tokens, attention_mask=torch.ones(2, 20)).logits, want)
    assert torch.equal(model(tokens, position_ids=torch.arange(20).expand(2, -1)).logits, want)
    assert_close(model(tokens, position_ids=torch.arange(7, 27).unsqueeze(0)).logits, want, rtol=1e-4, atol=1e-4)
    spread = model(tokens[:, :2], position_ids=torch.tensor([[0, 5]])).logits
    assert_close(spread[:, 1:], model(tokens[:, 1:2]).logits)  # neither counting up by one: a sequence of its own


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
    gates = gated(tokens, output_memories=True).gates
    assert len(gates) == 2
    assert_close(out.token_loss, plain)
    assert_close(out.mean_gate, torch.stack(gates).mean())
    assert_close(out.loss, plain + 0.5 * out.mean_gate)

    slow = make_model(fwpkm_key_update="slow", fwpkm_addressing_weight=0.25).train()
    out = slow(tokens, labels=tokens)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(out.loss, plain + 0.25 * out.addressing_loss)
    out.loss.backward()
    assert slow.model.layers[0].memory.keys.grad.abs().sum() > 0


def test_labels_can_be_left_out():
    model = make_model()
    tokens = torch.randint(32, (1, 12))
    labels = tokens.clone()
    labels[:, :6] = -100
    out = model(tokens, labels=labels)
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[0, 5:-1], tokens[0, 6:]))


@pytest.mark.parametrize(
    "options",
    [{}, {"layer_types": [LINEAR, FULL], "pkm_layers": [1], "fwpkm_layers": [0], "fwpkm_learn_initial_values": True}],
)
def test_training_reduces_the_loss_and_reaches_every_parameter(options):
    model = make_model(**options).train()
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
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("key_update", KEY_UPDATES)
@torch.no_grad()
def test_save_and_load(tmp_path, key_update):
    learned = key_update == "slow"
    layout = {"layer_types": [LINEAR, SLIDING], "pkm_layers": [1], "fwpkm_learn_initial_values": learned}
    model = make_model(fwpkm_key_update=key_update, **layout)
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
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json", ".py", ".safetensors"]
    want, half = model.bfloat16().state_dict(), FwPKMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[1].mlp.values.dtype == torch.float32
    for name, x in half.state_dict().items():
        assert_close(x, want[name], rtol=0, atol=0)


@torch.no_grad()
def test_what_a_checkpoint_lacks_is_drawn(tmp_path):
    """Other mixers and memories on top of a trained model start as in a new one."""
    make_model(fwpkm_layers=[]).save_pretrained(tmp_path)
    config = make_config(layer_types=[LINEAR, FULL], pkm_layers=[1], linear_num_key_heads=16, linear_num_value_heads=64)
    model = FwPKMForCausalLM.from_pretrained(tmp_path, config=config)
    decay, memory = model.model.layers[0].linear_attn, model.model.layers[1].mlp
    assert torch.equal(decay.dt_bias, torch.ones(64))
    assert 0.01 <= decay.A_log.exp().min() < 2
    assert 14 < decay.A_log.exp().max() <= 16
    assert memory.keys.abs().max() <= 6**-0.5
    assert 0.8 * 8**-0.5 < memory.values.std() < 1.2 * 8**-0.5
    assert model(torch.randint(32, (1, 20))).logits.isfinite().all()


@torch.no_grad()
def test_memories_stay_float32_in_half_precision():
    """Cast or loaded, sub-keys and values are those of the checkpoint; the rest of the model is cast."""
    model = make_model(layer_types=[LINEAR, FULL], pkm_layers=[0], fwpkm_learn_initial_values=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    kept = set()
    for name, x in model.bfloat16().state_dict().items():
        if x.dtype == torch.float32:
            assert torch.equal(x, before[name])
            kept.add(name)
        else:
            assert torch.equal(x, before[name].bfloat16())
    memories = ("model.layers.0.memory", "model.layers.1.memory", "model.layers.0.mlp")
    assert kept == {f"{module}.{name}" for module in memories for name in ("keys", "values")}
    assert model(torch.randint(32, (2, 20))).logits.dtype == torch.bfloat16


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
        ({"pkm_layers": [-1]}, r"pkm_layers is -1; expected a block in \[0, 2\)"),
        ({"pkm_heads": 0}, "pkm_heads is 0; expected an integer >= 1"),
        ({"pkm_key_dim": 5}, "pkm_key_dim is 5; expected a positive even number"),
        ({"pkm_topk": 6}, r"pkm_topk is 6; expected at most pkm_n_subkeys \(5\)"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0; expected an integer >= 1"),
        (
            {"linear_num_key_heads": 3},
            r"linear_num_value_heads is 2; expected a multiple of linear_num_key_heads \(3\)",
        ),
        ({"fwpkm_topk": "8"}, "fwpkm_topk is '8'; expected an integer >= 1"),
        ({"fwpkm_score_eps": math.inf}, "fwpkm_score_eps is inf; expected a number > 0, and finite"),
        ({"hidden_size": "large"}, "hidden_size is 'large'; expected an integer >= 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected an integer >= 1"),
        ({"fwpkm_n_subkeys": True}, "fwpkm_n_subkeys is True; expected an integer >= 1"),
        ({"vocab_size": 1 << 63}, "vocab_size is 9223372036854775808; expected an integer >= 1"),
        ({"fwpkm_query_conv": -1}, "fwpkm_query_conv is -1; expected an integer >= 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; expected a number > 0, and finite"),
        ({"fwpkm_gate_weight": math.nan}, "fwpkm_gate_weight is nan; expected a number >= 0, and finite"),
        ({"attention_dropout": 2}, "attention_dropout is 2; expected a share, at most 1"),
        ({"hidden_act": "loud"}, "hidden_act is 'loud'; expected 'gelu' or"),
        ({"attention_bias": "no"}, "attention_bias is 'no'; expected true or false"),
        ({"sliding_window": -3}, "sliding_window is -3; expected an integer >= 1"),
        ({"rope_parameters": {"rope_theta": math.inf}}, r"rope_parameters\['rope_theta'\] is inf; expected a number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads is 2; expected a multiple of num_key_value_heads \(3\)"),
        ({"fwpkm_key_dim": 5}, "fwpkm_key_dim is 5; expected a positive even number"),
        ({"fwpkm_layers": "0"}, "fwpkm_layers is '0'; expected a list"),
        ({"fwpkm_layers": ["0"]}, r"fwpkm_layers is '0'; expected a block in \[0, 2\)"),
        ({"fwpkm_layers": [0, 0]}, r"fwpkm_layers is \[0, 0\]; expected each block once"),
        ({"fwpkm_tpok": 3}, "a field is 'fwpkm_tpok'; expected fields of FwPKMConfig"),
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


def test_bad_placement():
    model = make_model()
    tokens, cache = torch.randint(32, (2, 12)), FwPKMCache(model.config)
    model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask.shape is \[2, 12\]; expected \[2, 24\]"):
        model(tokens, attention_mask=torch.ones(2, 12), past_key_values=cache)
    with pytest.raises(ValueError, match=r"position_ids.shape is \[1, 11\]; expected \[B, 12\]"):
        model(tokens, position_ids=torch.arange(11).unsqueeze(0))
    with pytest.raises(ValueError, match=r"position_ids.shape\[0\] is 3; expected 1 or 2"):
        model(tokens, position_ids=torch.arange(12).expand(3, -1))
    with pytest.raises(ValueError, match=r"position_ids.dtype is torch.float32; expected torch.int64"):
        model(tokens, position_ids=torch.arange(12.0).unsqueeze(0))
    packed, mask = (torch.arange(12) % 6).unsqueeze(0), torch.ones(2, 12)
    mask[0, 0] = 0
    for options in ({"attention_mask": mask}, {"use_cache": True}):
        with pytest.raises(ValueError, match="position_ids is not counting up by one; expected one sequence a row"):
            model(tokens, position_ids=packed, **options)
