"""PEFT and TRL, with what they do unless told otherwise."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install fwpkm[ecosystem]")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install fwpkm[ecosystem]")
from datasets import Dataset  # noqa: E402 (after the skip)
from transformers import AutoTokenizer  # noqa: E402

from tests.ecosystem.conftest import make  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers'
TOKENS = torch.arange(40, 136).unsqueeze(0)
TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "memory": r".*memory\.(query|value|output|gate)",
    "all linear": "all-linear",
}


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def adapted(targets, **options):
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(make(), config)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_adapters_learn_merge_and_are_saved(targets, tmp_path):
    model = adapted(targets)
    assert not torch.allclose(logits(model), logits(make()), atol=1e-3)
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    learning = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learning)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in learning.values())
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), want, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), want, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded), want, atol=1e-4)


def test_modules_to_save(tmp_path):
    """A memory trained as a whole beside adapters of attention."""
    model = adapted(TARGETS["attention"], modules_to_save=["memory"])
    names = {n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert any("memory" in name for name in names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.mul_(1.5)
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), want, atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload()), want, atol=1e-4)


@pytest.mark.parametrize("adapters", [False, True])
def test_sft_on_defaults(checkpoint, tmp_path, adapters):
    texts = Dataset.from_dict({"text": [f"The number of {i} is {i * i}." for i in range(8)]})
    options = {
        "max_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    trainer = trl.SFTTrainer(
        str(checkpoint),
        args=trl.SFTConfig(str(tmp_path / "sft"), **options),
        train_dataset=texts,
        peft_config=config,
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "done"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "done")
    assert (tokenizer.eos_token_id, tokenizer("é")["input_ids"]) == (255, [0xC3, 0xA9])
