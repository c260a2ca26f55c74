"""Sparse ``[R, n]`` matrices of queries and sub-keys: a few selected sub-keys a query, codebook by codebook."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.ops._rows import add_to_rows_, row_products, segment, token_of_entry, weighted_sum


class Selected(NamedTuple):
    """A coefficient for each of the ``k`` sub-keys that a row selects, in ``G`` codebooks of ``n``."""

    coefficients: Tensor  # [G, R, k]
    entries: Tensor  # [G * R, k] the sub-keys, numbered through all codebooks
    n: int

    @classmethod
    def of(cls, coefficients: Tensor, sub_slots: Tensor, n: int) -> Selected:
        """Coefficients and the sub-keys that they belong to, ``[G, R, k]`` each."""
        first = (torch.arange(sub_slots.shape[0], device=sub_slots.device) * n).view(-1, 1, 1)
        return cls(coefficients, (sub_slots + first).flatten(0, 1), n)

    def times(self, subkeys: Tensor) -> Tensor:
        """``[G, n, d]`` -> ``[G, R, d]``: each row's weighted sum of its sub-keys."""
        out = weighted_sum(subkeys.flatten(0, 1).contiguous(), self.entries, self.coefficients.flatten(0, 1))
        return out.view(*self.coefficients.shape[:2], subkeys.shape[-1])

    def transposed_times(self, rows: Tensor) -> Tensor:
        """``[G, R, d]`` -> ``[G, n, d]``: each sub-key's weighted sum of the rows that selected it."""
        groups, _, width = rows.shape
        out = rows.new_zeros(groups * self.n, width)
        segments = segment(self.entries.reshape(-1), token_of_entry(self.entries))
        add_to_rows_(out, segments, self.coefficients, rows.reshape(-1, width))
        return out.view(groups, self.n, width)

    def sums(self) -> Tensor:
        """``[G, n]``: each sub-key's sum of coefficients."""
        groups = self.coefficients.shape[0]
        out = self.coefficients.new_zeros(groups * self.n)
        return out.index_add_(0, self.entries.flatten(), self.coefficients.flatten()).view(groups, self.n)

    def products(self, rows: Tensor, subkeys: Tensor) -> Tensor:
        """``<row, sub-key>`` of ``[G, R, d]`` and ``[G, n, d]`` where selected: ``[G, R, k]``."""
        table, sources = subkeys.flatten(0, 1).contiguous(), token_of_entry(self.entries)
        found = row_products(table, self.entries.reshape(-1), rows.flatten(0, 1), sources)
        return found.view(self.coefficients.shape)
