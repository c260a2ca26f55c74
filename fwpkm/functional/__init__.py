"""Section 2 of docs/design.md over the operators."""

from fwpkm.functional.fast_weight_memory import MemoryResult, fast_weight_memory

__all__ = ["MemoryResult", "fast_weight_memory"]
