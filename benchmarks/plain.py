"""The memory as one would write it down in PyTorch: a copy of the values for every commit, autograd for the rest.

It is the baseline that is always there, and in float64, where its outputs are compared with ``fwpkm/reference.py`` for
every case, what gradients are compared with. It is not the reference itself because that writes out every difference
of a query and a sub-key, whose graph does not fit at the paper's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.cases import Case, Inputs

EPS = 1e-3
LOOKAHEAD = 1


class Address(NamedTuple):
    """Where the tokens of a chunk read."""

    scores: Tensor  # [P, H, k]
    slots: Tensor  # [P, H, k]
    sub_slots: Tensor  # [P, H, 2, k]


def fast_weight_memory(inputs: Inputs, case: Case) -> Tensor:
    """Outputs ``[B, T, Dv]`` of section 2 of docs/design.md with a :class:`fwpkm.MemoryConfig`'s defaults."""
    rows = zip(inputs.query, inputs.target, inputs.gate, strict=True)
    return torch.stack([_sequence(*row, inputs.keys, inputs.values, case) for row in rows])


def _sequence(query: Tensor, target: Tensor, gate: Tensor, keys: Tensor, values: Tensor, case: Case) -> Tensor:
    outputs = []
    for start in range(0, case.tokens, case.chunk):
        q, y, g = (x[start : start + case.chunk] for x in (query, target, gate))
        found = address(q, keys, case.topk)
        slots, weights = found.slots.flatten(1), found.scores.flatten(1).softmax(-1)
        read = (weights.unsqueeze(-1) * values[slots]).sum(1)
        outputs.append(read)
        if start + case.chunk >= case.tokens:
            break  # nothing reads what the last chunk would store
        residuals = g[:-LOOKAHEAD, None] * (y[LOOKAHEAD:] - read[:-LOOKAHEAD])
        scale = slots.shape[1] * case.chunk / (case.chunk - LOOKAHEAD)
        counts = torch.bincount(slots.flatten(), minlength=values.shape[0])
        coefficients = (scale * weights / counts[slots])[:-LOOKAHEAD]
        writes = coefficients.unsqueeze(-1) * residuals.unsqueeze(1)
        values = values.index_add(0, slots[:-LOOKAHEAD].flatten(), writes.flatten(0, 1))
        if case.key_update == "fast":
            keys = key_commit(q, keys, found.sub_slots)
    return torch.cat(outputs)


def sub_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Queries ``[P, H, Dk]`` against ``keys [H, 2, n, Dk/2]``: ``[P, H, 2, n]``."""
    halves = query.unflatten(-1, (2, -1))
    products = torch.einsum("phcd,hcnd->phcn", halves, keys)
    squared = halves.square().sum(-1, keepdim=True) - 2 * products + keys.square().sum(-1)
    return -torch.log(EPS + squared.clamp_min(0))


def address(query: Tensor, keys: Tensor, k: int) -> Address:
    n = keys.shape[-2]
    best, sub_slots = sub_scores(query, keys).topk(k)
    scores, cells = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2).topk(k)
    slots = sub_slots[..., 0, :].gather(-1, cells // k) * n + sub_slots[..., 1, :].gather(-1, cells % k)
    return Address(scores, slots, sub_slots)


def margins(query: Tensor, keys: Tensor, k: int) -> Tensor:
    """How far the last slot taken is from the first one left, and so in each codebook: the least of them, ``[P]``."""
    best, _ = sub_scores(query, keys).topk(min(k + 1, keys.shape[-2]))
    grid = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
    if grid.shape[-1] <= k:
        return query.new_full(query.shape[:1], torch.inf)
    pairs = grid.topk(k + 1).values
    gaps = [pairs[..., k - 1] - pairs[..., k]]
    if best.shape[-1] > k:
        gaps += list((best[..., k - 1] - best[..., k]).unbind(-1))
    return torch.stack(gaps).amin((0, 2))


def key_commit(query: Tensor, keys: Tensor, sub_slots: Tensor) -> Tensor:
    """One step on the addressing loss, whose gradient is autograd's."""
    differentiable = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
    with torch.enable_grad():
        moving = keys if keys.requires_grad else keys.detach().requires_grad_()
        selected = sub_scores(query, moving).gather(-1, sub_slots)
        usage = query.new_zeros(*query.shape[:2], 2, keys.shape[-2])
        mean = usage.scatter(-1, sub_slots, selected.softmax(-1)).mean((0, 1))
        loss = (mean * torch.log(mean + 1e-8)).sum()
        (gradient,) = torch.autograd.grad(loss, moving, create_graph=differentiable)
    return keys - gradient
