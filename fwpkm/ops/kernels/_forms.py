"""The forms in which a kernel is compiled: few, so that no length and no batch gets a kernel of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """One compiled form of a kernel, with the types and constants that its launch function would choose.

    Each kernel's module lists those that matter as ``forms() -> list[Form]``: they are compiled ahead of time for every
    GPU generation, and their registers, spills and loads held to a committed table.
    """

    name: str
    kernel: Any  # the function under triton.jit
    types: dict[str, str]  # of the arguments: "*fp32", "i64", ...
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # arguments (pointers, sizes) that are multiples of 16
    num_warps: int
    num_stages: int = 2


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size``."""
    return max(least, 1 << (max(size, 1) - 1).bit_length())
