"""transformers' Trainer compiles the model by itself."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from tests.compile.test_model import make, tokens


@pytest.mark.unpoisoned
@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_torch_compile_of_trainer(scope, tmp_path):
    """The weights of three steps are those without compilation; a first graph, one for pending changes, no break."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(12, 33)]
    weights = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        counters.clear()
        model = make(fwpkm_scope=scope, fwpkm_key_update="slow")
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **options,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        model.commit()
        weights.append({name: x.detach().clone() for name, x in model.state_dict().items()})
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] == (2 if scope == "shared" else 1)
    for name, value in weights[0].items():
        assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
