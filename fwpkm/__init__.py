"""Fast-weight Product Key Memory as PyTorch operators, layers and models."""

__version__ = "0.1.0"

from fwpkm import layers, models, ops  # transformers' Auto classes know the model from here on
from fwpkm.functional import MemoryResult, fast_weight_memory
from fwpkm.memory import FastWeights, MemoryConfig, MemoryState
from fwpkm.session import Session

__all__ = [
    "FastWeights",
    "MemoryConfig",
    "MemoryResult",
    "MemoryState",
    "Session",
    "fast_weight_memory",
    "layers",
    "models",
    "ops",
]
