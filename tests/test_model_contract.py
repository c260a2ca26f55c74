"""What transformers and the programs around it take for granted of a language model: each once, for every layout.

What cannot hold here, and why:

- Fast-weight buffers are drawn, not computed: making them anew does not give what a checkpoint held, so they are saved.
- The attention implementation of a model for which none was asked is ``"windowed_sdpa"``, which is ``"sdpa"`` with
  windows computed by blocks, not ``"sdpa"`` by name.
- No cache is made unless it is asked for: one whose state grows would make rows of several sequences an error.
"""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from fwpkm.layers.host import CACHE
from fwpkm.models import FwPKMCache, FwPKMForCausalLM, FwPKMForSequenceClassification, FwPKMModel
from tests.draws import Draw
from tests.test_models import FULL, LINEAR, SLIDING, make_config, make_model

LAYOUTS = {
    "windows": {"layer_types": [SLIDING, FULL]},
    "linear": {"layer_types": [LINEAR, FULL]},
    "slow": {"layer_types": [SLIDING, FULL], "fwpkm_key_update": "slow", "fwpkm_write_scale": "exact"},
    "product keys": {"layer_types": [FULL, FULL], "fwpkm_layers": [0], "pkm_layers": [1]},
    "tied": {"layer_types": [FULL, SLIDING], "tie_word_embeddings": True},
    "no memory": {"layer_types": [FULL, SLIDING], "fwpkm_layers": []},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def draw_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return Draw(seed).integers(32, *shape)


@every_layout
@torch.no_grad()
def test_embeddings_may_come_in_the_place_of_tokens(layout):
    model, tokens = make_model(**layout), draw_tokens(2, 21)
    embeddings = model.get_input_embeddings()(tokens)
    assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits, rtol=0, atol=0)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    given = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert_close(given, model(tokens, attention_mask=mask).logits, rtol=0, atol=0)
    how = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(inputs_embeds=embeddings, **how), model.generate(tokens, **how)[:, 21:])


def test_tokens_or_embeddings_and_not_both():
    model, tokens = make_model(), draw_tokens(1, 4)
    with pytest.raises(ValueError, match=r"neither given; expected exactly one of them"):
        model()
    with pytest.raises(ValueError, match=r"\['input_ids', 'inputs_embeds'\]; expected exactly one of them"):
        model(tokens, inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match=r"inputs_embeds.shape is \[1, 4, 15\]; expected \[B, T, 16\]"):
        model(inputs_embeds=torch.zeros(1, 4, 15))


@every_layout
@torch.no_grad()
def test_the_head_stands_on_the_backbone(layout):
    model, tokens = make_model(**layout), draw_tokens(2, 21)
    hidden = model.base_model(tokens).last_hidden_state
    assert isinstance(model.base_model, FwPKMModel)
    assert_close(model(tokens).logits, model.lm_head(hidden), rtol=0, atol=0)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == layout.get("tie_word_embeddings", False)


@every_layout
@torch.no_grad()
def test_hidden_states_are_those_between_blocks(layout):
    model, tokens = make_model(**layout), draw_tokens(2, 21)
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out.hidden)) for block in model.model.layers]
    output = model(tokens, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    first, *between, last = output.hidden_states
    assert_close(first, model.model.embed_tokens(tokens), rtol=0, atol=0)
    for have, want in zip(between, seen[:-1], strict=True):
        assert_close(have, want, rtol=0, atol=0)
    assert_close(last, model.model.norm(seen[-1]), rtol=0, atol=0)
    assert model(tokens).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == len(seen) + 1


@every_layout
@torch.no_grad()
def test_attentions_are_weights_of_what_a_token_sees(layout):
    model, tokens = make_model(**layout, attn_implementation="eager"), draw_tokens(2, 21)
    attentions = model(tokens, output_attentions=True).attentions
    kinds = [kind for kind in model.config.layer_types if kind != LINEAR]
    for kind, weights in zip(kinds, attentions, strict=True):
        assert weights.shape == (2, 2, 21, 21)
        assert_close(weights.sum(-1), torch.ones(2, 2, 21))
        distance = torch.arange(21).unsqueeze(1) - torch.arange(21)
        seen = (distance >= 0) & (distance < (6 if kind == SLIDING else 21))
        assert torch.equal(weights > 0, seen.expand_as(weights))
    assert model(tokens).attentions is None


@torch.no_grad()
def test_attentions_are_none_where_nobody_knows_them():
    model, tokens = make_model(), draw_tokens(1, 4)
    output = model(tokens, output_attentions=True)
    assert output.attentions is None
    assert_close(output.logits, model(tokens).logits)


@every_layout
@torch.no_grad()
def test_a_tuple_holds_what_the_output_holds(layout):
    model, tokens = make_model(**layout), draw_tokens(2, 9)
    options = {"labels": tokens, "use_cache": True, "output_hidden_states": True, "output_memories": True}
    output = model(tokens, **options)
    values = model(tokens, **options, return_dict=False)
    assert len(values) == len(output)
    assert_close(values[0], output.loss)
    assert_close(values[1], output.logits)
    plain = model(tokens, labels=tokens)
    assert list(plain) == ["loss", "logits"]
    model.config.return_dict = False
    assert [type(x) for x in model(tokens)] == [torch.Tensor]


@every_layout
@torch.no_grad()
def test_logits_to_keep(layout):
    model, tokens = make_model(**layout), draw_tokens(2, 9)
    whole = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=3).logits, whole[:, -3:])
    columns = torch.tensor([0, 4, 5])
    assert_close(model(tokens, logits_to_keep=columns).logits, whole[:, columns])


@pytest.mark.parametrize("name", ["labls", "cache_position", "token_type_ids"])
def test_an_unknown_keyword_is_an_error(name):
    for model in (make_model(), make_model().model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            model(draw_tokens(1, 4), **{name: draw_tokens(1, 4)})


@torch.no_grad()
def test_the_cache_has_two_names():
    model, tokens = make_model(), draw_tokens(1, 20)
    want = model(tokens).logits[:, 12:]
    for name in ("cache", "past_key_values"):
        cache = FwPKMCache(model.config)
        first = model(tokens[:, :12], **{name: cache})
        assert first[CACHE] is cache
        assert_close(model(tokens[:, 12:], **{name: cache}).logits, want)
    with pytest.raises(ValueError, match="past_key_values is given beside cache; expected one of them"):
        model(tokens, cache=cache, past_key_values=cache)


@every_layout
def test_every_parameter_has_a_gradient(layout):
    model, tokens = make_model(**layout).train(), draw_tokens(2, 30)
    model(tokens, labels=tokens).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_layout
def test_hidden_states_keep_their_gradients(layout):
    model, tokens = make_model(**layout).train(), draw_tokens(2, 9)
    output = model(tokens, labels=tokens, output_hidden_states=True)
    for hidden in output.hidden_states[:-1]:
        hidden.retain_grad()
    output.loss.backward()
    assert all(hidden.grad is not None and hidden.grad.any() for hidden in output.hidden_states[:-1])


# Losses.

TERMS = {"fwpkm_key_update": "slow", "fwpkm_addressing_weight": 0.5, "fwpkm_gate_weight": 0.25}


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_in_evaluation_the_loss_is_the_cross_entropy():
    model, tokens = make_model(**TERMS), draw_tokens(2, 21)
    output = model(tokens, labels=tokens)
    assert_close(output.loss, plain_loss(output.logits, tokens))
    assert output.token_loss is output.addressing_loss is output.mean_gate is None
    trained = model.train()(tokens, labels=tokens)
    assert_close(trained.token_loss, output.loss)
    assert trained.addressing_loss.abs() > 0.01
    assert_close(trained.loss, trained.token_loss + 0.5 * trained.addressing_loss + 0.25 * trained.mean_gate)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_all_terms_are_weighted_by_the_share_of_labels(kind):
    """Where a batch comes in several calls."""
    tokens = draw_tokens(6, 21)
    labels = tokens.clone()
    labels[0, :13] = -100
    labels[4, 5:] = -100
    items = kind(int((labels[:, 1:] != -100).sum()))
    model = make_model(**TERMS).train()
    for x, y in zip(tokens.split(2), labels.split(2), strict=True):
        output = model(x, labels=y, num_items_in_batch=items)
        mean, share = plain_loss(output.logits, y), (y[:, 1:] != -100).sum() / items
        assert_close(output.token_loss, mean * share)
        terms = 0.5 * output.addressing_loss + 0.25 * output.mean_gate
        assert_close(output.loss, (mean + terms) * share)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_trainer_gives_the_same_gradients_however_it_accumulates(tmp_path, accumulate):
    tokens = draw_tokens(8, 21)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    whole = make_model(**TERMS).train()
    whole(tokens, labels=tokens).loss.backward()
    want = {name: p.grad for name, p in whole.named_parameters()}

    model = make_model(**TERMS)
    have = {}

    class Watched(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(
                lambda *_: have.update({name: p.grad.clone() for name, p in model.named_parameters()})
            )
            return optimizer

    Watched(model, training_arguments(tmp_path, 8 // accumulate, accumulate), train_dataset=data).train()
    for name, gradient in want.items():
        assert_close(have[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def training_arguments(folder: Path, batch: int, accumulate: int = 1) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
    )


@every_layout
def test_trainer_evaluates_cross_entropy_and_hands_logits_to_metrics(tmp_path, layout):
    """On a last batch of another size, too."""
    tokens = draw_tokens(5, 13)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    model = make_model(**TERMS | layout)
    seen = []

    def compute_metrics(prediction):
        logits, labels = prediction
        seen.append(logits.shape)
        return {"accuracy": float((logits.argmax(-1)[:, :-1] == labels[:, 1:]).mean())}

    trainer = Trainer(model, training_arguments(tmp_path, 2), eval_dataset=data, compute_metrics=compute_metrics)
    figures = trainer.evaluate()
    with torch.no_grad():
        logits = model(tokens).logits
    assert seen == [(5, 13, 32)]
    assert figures["eval_loss"] == pytest.approx(plain_loss(logits, tokens).item(), rel=1e-4)
    assert figures["eval_accuracy"] == pytest.approx((logits.argmax(-1)[:, :-1] == tokens[:, 1:]).float().mean().item())


# Checkpoints and classes.


@torch.no_grad()
def test_a_qwen3_checkpoint_loads_with_nothing_but_the_memories_missing(tmp_path):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    qwen = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False)).eval()
    qwen.save_pretrained(tmp_path)
    config = make_config(layer_types=[FULL, FULL], rope_parameters=qwen.config.rope_parameters)
    model, info = FwPKMForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert info["missing_keys"]
    assert all(".memory." in name for name in info["missing_keys"])
    for memory in model.memories():
        memory.output.weight.zero_()
        memory.output.bias.zero_()
    tokens = draw_tokens(2, 21)
    assert_close(model.eval()(tokens).logits, qwen(tokens).logits)


@every_layout
@torch.no_grad()
def test_heads_share_the_backbone_of_a_checkpoint(tmp_path, layout):
    model = make_model(**layout)
    model.save_pretrained(tmp_path)
    tokens = draw_tokens(2, 9)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    want = model.base_model(tokens).last_hidden_state
    assert_close(backbone(tokens).last_hidden_state, want, rtol=0, atol=0)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, model(tokens).logits)
    shapes = {
        AutoModelForSequenceClassification: {"logits": (2, 3)},
        AutoModelForTokenClassification: {"logits": (2, 9, 3)},
        AutoModelForQuestionAnswering: {"start_logits": (2, 9), "end_logits": (2, 9)},
    }
    for auto, expected in shapes.items():
        head = auto.from_pretrained(tmp_path, num_labels=3, pad_token_id=31).eval()
        found = head(tokens, output_hidden_states=True)
        assert {name: tuple(found[name].shape) for name in expected} == expected
        assert_close(found.hidden_states[-1], want, rtol=0, atol=0)


def test_a_classifier_trains_its_memory():
    torch.manual_seed(0)
    model = FwPKMForSequenceClassification(make_config(num_labels=3, pad_token_id=31)).train()
    model(draw_tokens(4, 21), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(memory.query.weight.grad.any() for memory in model.memories())


@every_layout
def test_a_saved_checkpoint_is_complete(tmp_path, layout):
    model = make_model(**layout)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


@every_layout
@torch.no_grad()
def test_embeddings_can_be_resized(layout):
    model, tokens = make_model(**layout), draw_tokens(2, 9)
    want = model(tokens).logits
    model.resize_token_embeddings(40)
    assert model.config.vocab_size == 40
    assert_close(model(tokens).logits[..., :32], want)
    assert model(torch.full((1, 3), 39)).logits.shape == (1, 3, 40)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == layout.get("tie_word_embeddings", False)


@every_layout
@torch.no_grad()
def test_attention_implementations_agree(layout):
    model, tokens = make_model(**layout), draw_tokens(2, 21)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    want = model(tokens, attention_mask=mask).logits
    assert model.config._attn_implementation == "windowed_sdpa"
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        assert_close(model(tokens, attention_mask=mask).logits[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-5)
