"""Reads alone: the weighted sum of the rows that each token addresses, by our operator and by PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.cases import Case
from fwpkm import ops


class Rows(NamedTuple):
    """What is read, and from where."""

    values: Tensor  # [N, Dv]
    slots: Tensor  # [P, H * k]
    weights: Tensor  # [P, H * k]


Read = Callable[[Tensor, Tensor, Tensor], Tensor]


def bag(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def indexing(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * values[slots]).sum(-2)


READS: dict[str, Read] = {"memory_read": ops.memory_read, "embedding_bag": bag, "indexing": indexing}


def draw(case: Case) -> Rows:
    """Slots anywhere, weights that sum to one."""
    generator = torch.Generator().manual_seed(0)
    shape = case.batch * case.tokens, case.heads * case.topk
    return Rows(
        torch.randn(case.n_slots, case.value_dim, generator=generator),
        torch.randint(case.n_slots, shape, generator=generator),
        torch.randn(shape, generator=generator).softmax(-1),
    )


def gradients(read: Read, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of values and weights for a cotangent of ones."""
    values, weights = (x.detach().requires_grad_() for x in (rows.values, rows.weights))
    output = read(values, rows.slots, weights)
    return output, *torch.autograd.grad(output.sum(), (values, weights))


def run(read: Read, rows: Rows) -> Callable[[bool], object]:
    """Without gradients, or with those of values and weights."""

    def once(backward: bool) -> object:
        if backward:
            return gradients(read, rows)
        with torch.no_grad():
            return read(*rows)

    return once
