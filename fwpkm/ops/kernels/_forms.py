"""The forms in which a kernel is compiled: few, so that no length and no batch gets a kernel of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

# Given to every launch: a multiply and an add may become one instruction. Triton's own default differs by version.
OPTIONS = {"enable_fp_fusion": True}


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
    wide: bool = False  # rows of values must be loaded 16 bytes at a time


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size``."""
    return max(least, 1 << (max(size, 1) - 1).bit_length())


class Columns(NamedTuple):
    """How programs share the columns of rows: ``blocks`` programs of ``block`` columns, or one that goes over them.

    A kernel gets the width as ``units`` times the constant ``unit``, so that the compiler knows what a row's start is a
    multiple of, and loads 16 bytes at a time where that is so.
    """

    units: int
    unit: int
    block: int
    blocks: int
    num_warps: int

    @classmethod
    def of(cls, width: int, itemsize: int = 4, most: int = 1024) -> Columns:
        """For rows of ``width`` numbers of ``itemsize`` bytes: 16 of them a thread, in at most ``most`` columns."""
        unit = min(width & -width, 16) or 1  # the largest power of two up to 16 that divides the width
        block = min(bucket(width, 32), most)
        return cls(width // unit, unit, block, -(-width // block), max(1, block * itemsize // 512))
