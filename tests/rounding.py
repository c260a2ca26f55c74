"""What holds of residuals in half precision however they came about, and a check of it for tests of two paths.

A residual is computed in float32 and rounded once. Two ways to compute it differ in the last bits of a float32, so
where it lies that close to the middle of two half-precision numbers one path may round it up and another down; and
what is read later differs by what that changes. So two paths do not have the same records. What holds of each
(docs/design.md, section 3): **a record is the rounding of a number within float32's error of what the records before it
give.** Here a path's records are checked one by one in a second computation, which goes on with the path's own: what
both read is then the same but for float32's error, however long the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from fwpkm import MemoryState

# in their packages functions have these names
SCAN, CALL = import_module("fwpkm.ops.memory_scan"), import_module("fwpkm.functional.fast_weight_memory")
ERROR = 2e-5  # of residuals of size 1 on two paths in float32; a bfloat16 near 1 stands for numbers 2e-3 away


@dataclass
class Followed:
    """How many residuals were compared, how many of them had been rounded to a neighbour, how far off at most."""

    compared: int = 0
    neighbours: int = 0
    worst: float = 0.0

    def take(self, exact: Tensor, given: Tensor) -> Tensor:
        """``given`` as it is, if ``exact``, or a number within float32's error of it, is rounded to it."""
        half = given.bfloat16()
        assert torch.equal(half.to(given.dtype), given), "these residuals are not rounded to bfloat16"
        low, high = ((half.double() + half.nextafter(half.new_tensor(x)).double()) / 2 for x in (-torch.inf, torch.inf))
        outside = torch.maximum(low - exact, exact - high).clamp_min(0) / exact.double().abs().clamp_min(1)
        self.compared += exact.numel()
        self.neighbours += int((exact.bfloat16() != half).sum())
        self.worst = max(self.worst, float(outside.max())) if outside.numel() else self.worst
        assert self.worst <= ERROR, f"a residual is {self.worst:.2g} outside of what is rounded to what its record has"
        return given


@contextmanager
def following(records: Sequence[Tensor]) -> Iterator[Followed]:
    """Have memories that read a text in one call go on with another path's residuals, of each ``[M, T, Dv]`` by token.

    They are taken in the order in which the memories read. There have to be some for all chunks but the last.
    """
    original, followed, layer = SCAN._residuals, Followed(), -1

    def residuals(s: int, targets: Tensor, gates: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal layer
        exact = original(s, targets, gates, out, gates.dtype)
        assert dtype == torch.bfloat16, f"what is read is rounded to {dtype}"
        layer += s == 0
        tokens = targets.shape[2]
        given = records[layer][:, s * tokens : (s + 1) * tokens].flatten(0, 1)
        assert given.shape == exact.shape, "records of some tokens are missing"
        return followed.take(exact, given.to(exact.dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SCAN, "_residuals", residuals)
        patch.setattr(CALL, "leaves_trail", lambda training: False)  # for which a call is read in two parts
        yield followed
    assert layer + 1 in (0, len(records)), f"{layer + 1} memories have read, of {len(records)}"


def by_token(residuals: Tensor, lookahead: int) -> Tensor:
    """``[..., T, Dv]`` as records have them, each that of the token ``lookahead`` before: now each token's own."""
    return torch.cat((residuals[..., lookahead:, :], torch.zeros_like(residuals[..., :lookahead, :])), -2)


def records_of(state: MemoryState) -> Tensor:
    """The residuals in the log of a state whose memories are equally far and have folded nothing, by token."""
    assert state.log is not None
    assert state.own_values is None
    return by_token(state.log.records.columns()[2].float(), state.log.lookahead)
