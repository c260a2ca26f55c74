"""Tiny models and random texts."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fwpkm.models import FwPKMConfig, FwPKMForCausalLM
from tests.children import CONFIG

VOCABULARY = 24


def model(seed: int = 0, **fields: Any) -> FwPKMForCausalLM:
    """Random weights; values large enough that what is written changes what is predicted."""
    torch.manual_seed(seed)
    made = FwPKMForCausalLM(FwPKMConfig(**{"vocab_size": VOCABULARY, **CONFIG, **fields})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def tokens(seed: int, *shape: int, high: int = VOCABULARY) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)
