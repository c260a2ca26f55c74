"""transformers' Trainer trains the model, too."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fwpkm.memory import KEY_UPDATES
from fwpkm.models import FwPKMForCausalLM
from tests.test_models import make_model


class Windows(Dataset):
    """Pieces of a text that repeats itself."""

    def __init__(self, count: int, length: int) -> None:
        self.text = torch.from_numpy(np.tile(np.arange(32), length))
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        piece = self.text[i % 32 : i % 32 + self.length]
        return {"input_ids": piece, "labels": piece}


@pytest.mark.parametrize("key_update", KEY_UPDATES)
def test_transformers_trainer(tmp_path, key_update):
    """It trains, evaluates and saves, without a line of this package's loop."""
    model = make_model(fwpkm_key_update=key_update)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        torch_compile=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(64, 24), eval_dataset=Windows(8, 24))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1.5
    assert trainer.evaluate()["eval_loss"] < before - 1.5
    trainer.save_model(str(tmp_path / "saved"))
    saved = FwPKMForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
