"""Sparse products of queries and sub-keys on a GPU: a few selected sub-keys for each half of a query.

Halves of queries are numbered as they lie in ``query [M, P, H, Dk]``, sub-keys as they lie in ``keys [M, H, 2, n, d]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.ops.cuda._rows import Segments, add_to_rows_, segment
from fwpkm.ops.kernels.row_products import row_products
from fwpkm.ops.kernels.weighted_sum import weighted_sum


class Selected(NamedTuple):
    """Which sub-keys ``[T, d]`` of all codebooks each half-query ``[R, d]`` selects."""

    entries: Tensor  # [R, k] into the sub-keys; -1: none
    n_subkeys: int  # T

    @classmethod
    def of(cls, sub_slots: Tensor, memories: int, n: int, mask: Tensor | None = None) -> Selected:
        """From ``sub_slots [M, P, H, 2, k]`` in codebooks of ``n``, for the keys of ``memories``, ``M`` or 1.

        Tokens that are False in ``mask [M, P]`` select nothing.
        """
        _, _, heads, _, k = sub_slots.shape
        codebooks = memories * heads * 2
        first = torch.arange(0, codebooks * n, n, device=sub_slots.device).view(memories, 1, heads, 2, 1)
        entries = sub_slots + first
        if mask is not None:
            entries = torch.where(mask[:, :, None, None, None], entries, -1)
        return cls(entries.view(-1, k), codebooks * n)

    def times(self, coefficients: Tensor, subkeys: Tensor) -> Tensor:
        """``[R, k]``, ``[T, d]`` -> ``[R, d]``: each half-query's weighted sum of its sub-keys."""
        out = subkeys.new_empty(self.entries.shape[0], subkeys.shape[1])
        weighted_sum(out, subkeys, self.entries, coefficients)
        return out

    def products(self, halves: Tensor, subkeys: Tensor) -> Tensor:
        """``<half-query, sub-key>`` of ``[R, d]`` and ``[T, d]`` where selected: ``[R, k]``."""
        out = subkeys.new_empty(self.entries.shape)
        row_products(out, subkeys, self.entries, halves)
        return out

    def by_subkey(self) -> Segments:
        """The selections sorted by sub-key, for the two sums below."""
        return segment(self.entries, self.n_subkeys)

    def transposed_times(self, segments: Segments, coefficients: Tensor, halves: Tensor) -> Tensor:
        """``[R, k]``, ``[R, d]`` -> ``[T, d]``: each sub-key's weighted sum of the half-queries that selected it."""
        out = coefficients.new_zeros(self.n_subkeys, halves.shape[1])
        add_to_rows_(out, segments, coefficients, halves)
        return out

    def sums(self, segments: Segments, coefficients: Tensor) -> Tensor:
        """``[R, k]`` -> ``[T, 1]``: each sub-key's sum of coefficients."""
        return self.transposed_times(segments, coefficients, coefficients.new_ones(self.entries.shape[0], 1))
