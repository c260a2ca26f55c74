"""A small model on bytes, in a checkpoint, as other people's tools take it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fwpkm.models import FwPKMConfig, FwPKMForCausalLM

os.environ["HF_HUB_OFFLINE"] = "1"
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "fwpkm_layers": [0],
    "fwpkm_n_subkeys": 16,
    "fwpkm_key_dim": 16,
    "fwpkm_value_dim": 16,
    "fwpkm_chunk_size": 32,
    "fwpkm_query_conv": 4,
    "fwpkm_key_update": "slow",
    "fwpkm_write_scale": "exact",
    "fwpkm_gate_weight": 0.1,
}


def make(**fields: object) -> FwPKMForCausalLM:
    """The same weights each time, large enough to see what a memory does."""
    torch.manual_seed(0)
    model = FwPKMForCausalLM(FwPKMConfig(**CONFIG | fields)).eval()
    with torch.no_grad():
        for memory in model.memories():
            memory.output.weight.mul_(4)
    return model


@pytest.fixture
def model() -> FwPKMForCausalLM:
    return make()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    make().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def torchs_own_choice() -> None:
    """These programs do not ask for deterministic algorithms; what is not theirs is tested elsewhere."""
    torch.use_deterministic_algorithms(False)
