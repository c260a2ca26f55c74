"""transformers' Trainer: what it reports, whatever the batches are cut into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from tests.ecosystem.conftest import make

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer's


def rows(count):
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 250, (64,), generator=generator) for _ in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def arguments(folder, **options):
    given = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
        "max_grad_norm": 0,
    }
    return TrainingArguments(str(folder), **given | options)


def test_evaluation_is_the_cross_entropy(model, tmp_path):
    """Of an uneven last batch too, with metrics of the predictions as transformers' documentation takes them."""
    data, seen = rows(5), {}

    def metrics(predicted):
        logits, labels = predicted
        seen["shape"] = logits.shape
        return {"accuracy": (np.argmax(logits, -1)[:, :-1] == labels[:, 1:]).mean()}

    trainer = Trainer(
        model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=data, compute_metrics=metrics
    )
    found = trainer.evaluate()
    tokens = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        logits = model(tokens).logits
    want = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert found["eval_loss"] == pytest.approx(want.item(), abs=1e-4)
    assert seen["shape"] == (5, 64, 256)
    right = (logits[:, :-1].argmax(-1) == tokens[:, 1:]).float().mean()
    assert found["eval_accuracy"] == pytest.approx(right.item(), abs=1e-6)


def trained(folder, batch, accumulate, **options):
    """Gradients and reported loss of one step on eight texts."""
    model, found = make(), {}

    class Watched(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)

            def look(*_):
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

            self.optimizer.register_step_pre_hook(look)
            return optimizer

    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 1}
    loss = Watched(model, arguments(folder, **cut, **options), train_dataset=rows(8)).train().training_loss
    return found, loss


def same(first, second, rtol=1e-4):
    assert first.keys() == second.keys()
    assert first
    for name in first:
        scale = first[name].norm() + 1e-6
        assert (first[name] - second[name]).norm() <= rtol * scale, name


def test_accumulation_gives_the_same_step(tmp_path):
    (whole, loss), (parts, accumulated) = trained(tmp_path, 8, 1), trained(tmp_path, 2, 4)
    same(whole, parts)
    assert accumulated == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}])
def test_checkpointing_gives_the_same_step(tmp_path, options):
    same(trained(tmp_path, 8, 1)[0], trained(tmp_path, 8, 1, gradient_checkpointing=True, **options)[0])


def test_a_compiled_step_is_the_same(tmp_path):
    """Traced and differentiated as ever; the code that Inductor makes of it is tested in tests/compile."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    same(trained(tmp_path, 4, 1)[0], trained(tmp_path, 4, 1, **options)[0], rtol=1e-3)
