"""Fast-weight Product Key Memory as PyTorch operators, layers and models."""

from fwpkm.functional import MemoryResult, fast_weight_memory
from fwpkm.memory import FastWeights, MemoryConfig, MemoryState

__version__ = "0.1.0"

__all__ = ["FastWeights", "MemoryConfig", "MemoryResult", "MemoryState", "fast_weight_memory"]
