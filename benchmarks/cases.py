"""What is measured: the sizes, and inputs without near ties."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import plain
from fwpkm.memory import FastWeights, MemoryConfig

MARGIN = 1e-5  # of the float64 scores between the last slot taken and the first one left


@dataclass(frozen=True)
class Case:
    """One size; the letters of docs/design.md in words. The defaults are the paper's."""

    tokens: int = 2048
    n_subkeys: int = 512
    batch: int = 1
    topk: int = 8
    key_dim: int = 512
    value_dim: int = 512
    heads: int = 1
    chunk: int = 512
    key_update: str = "fast"

    @property
    def config(self) -> MemoryConfig:
        return MemoryConfig(topk=self.topk, chunk_size=self.chunk, key_update=self.key_update)

    @property
    def n_slots(self) -> int:
        return self.n_subkeys**2

    @property
    def n_chunks(self) -> int:
        return -(-self.tokens // self.chunk)


@dataclass(frozen=True)
class Inputs:
    """What a memory reads and starts from, in float32 unless told."""

    query: Tensor  # [B, T, H, Dk]
    target: Tensor  # [B, T, Dv]
    gate: Tensor  # [B, T]
    keys: Tensor  # [H, 2, n, Dk/2]
    values: Tensor  # [N, Dv]

    @property
    def weights(self) -> FastWeights:
        return FastWeights(self.keys, self.values)

    def to(self, kind: torch.dtype | torch.device) -> Inputs:
        return Inputs(*(x.to(kind) for x in (*self.leaves(), self.keys, self.values)))

    def leaves(self) -> list[Tensor]:
        """What gradients are asked for."""
        return [self.query, self.target, self.gate]

    def requiring_gradients(self) -> Inputs:
        query, target, gate = (x.detach().requires_grad_() for x in self.leaves())
        return Inputs(query, target, gate, self.keys, self.values)


def draw(case: Case, seed: int = 0) -> Inputs:
    """Random inputs as a layer makes them: normal queries and targets, uniform gates, a layer's initial weights."""
    generator = torch.Generator().manual_seed(seed)
    bound = case.key_dim**-0.5
    rows = case.batch, case.tokens
    keys = (case.heads, 2, case.n_subkeys, case.key_dim // 2)
    return Inputs(
        torch.randn(*rows, case.heads, case.key_dim, generator=generator),
        torch.randn(*rows, case.value_dim, generator=generator),
        torch.rand(*rows, generator=generator),
        torch.empty(keys).uniform_(-bound, bound, generator=generator),
        torch.randn(case.n_slots, case.value_dim, generator=generator).mul_(case.value_dim**-0.5),
    )


@torch.no_grad()
def without_near_ties(
    case: Case, x: Tensor, keys: Tensor, query_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """Draw those tokens of ``x [B, T, ...]`` anew whose address could be another one in float32.

    Two slots whose float64 scores are closer than :data:`MARGIN` are a near tie: an implementation in float32 may take
    either, and everything that is read where it wrote then differs. ``query_of`` makes float64 queries ``[.., H, Dk]``
    of tokens. Keys move as the memory would move them.

    Returns:
        The tokens without near ties, and the share of them that was drawn anew.
    """
    generator = torch.Generator().manual_seed(1)
    x, redrawn = x.clone(), 0
    for row in x:
        moved = keys.double()
        for start in range(0, case.tokens, case.chunk):
            chunk = row[start : start + case.chunk]
            query = query_of(chunk)
            close = plain.margins(query, moved, case.topk) < MARGIN
            redrawn += int(close.sum())
            while bool(close.any()):
                fresh = torch.randn(int(close.sum()), *chunk.shape[1:], generator=generator)
                chunk[close] = fresh.to(chunk.dtype)
                query[close] = query_of(chunk[close])
                close = plain.margins(query, moved, case.topk) < MARGIN
            if case.key_update == "fast" and chunk.shape[0] == case.chunk:
                moved = plain.key_commit(query, moved, plain.address(query, moved, case.topk).sub_slots)
    return x, redrawn / (case.batch * case.tokens)


def safe_inputs(case: Case, seed: int = 0) -> tuple[Inputs, float]:
    """:func:`draw` without near ties, and the share of tokens drawn anew."""
    inputs = draw(case, seed)
    query, redrawn = without_near_ties(case, inputs.query, inputs.keys, lambda x: x.double())
    return dataclasses.replace(inputs, query=query), redrawn
