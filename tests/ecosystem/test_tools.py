"""Pipelines, offloads, pickles and other processes take the model as any other."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.ecosystem.conftest import make

TOKENS = torch.arange(40, 120).unsqueeze(0)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def test_pipeline(checkpoint, model):
    generate = pipeline("text-generation", str(checkpoint))
    texts = ["def é", "class"]
    found = generate(texts, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text, (made,) in zip(texts, found, strict=True):
        tokens = tokenizer(text, return_tensors="pt")
        alone = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        assert made["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_offloads(model, how, tmp_path):
    want = logits(model)
    if how == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk":
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        model = dispatch_model(model, {"model": "disk", "lm_head": "cpu"}, "cpu", offload_dir=str(tmp_path))
    assert torch.equal(logits(model), want)


def test_a_device_map_with_offload(checkpoint, model, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=str(tmp_path / "o"))
    assert torch.equal(logits(loaded), logits(model))


def test_whole_models_are_saved(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


def _read(model, answers):
    torch.set_num_threads(1)
    answers.put(logits(model).numpy())


def test_a_spawned_process_reads(model):
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_read, args=(make(), answers))
    process.start()
    found = torch.from_numpy(answers.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    assert torch.allclose(found, logits(model), atol=1e-6)
