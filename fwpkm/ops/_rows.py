"""Weighted sums of table rows on the CPU, without a ``[P, K, Dv]`` temporary: what reads and commits are made of.

All of it is deterministic: a sum runs in the order of its entries, one segment after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def weighted_sum(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``out[p] = sum_j weights[p, j] * table[index[p, j]]``: ``[R, D]``, twice ``[P, K]`` -> ``[P, D]``."""
    if index.numel() == 0:
        return table.new_zeros(index.shape[0], table.shape[1])
    index, weights = index.contiguous(), weights.contiguous()
    return torch.nn.functional.embedding_bag(index, table, per_sample_weights=weights, mode="sum")


def row_products(table: Tensor, index: Tensor, vectors: Tensor, sources: Tensor) -> Tensor:
    """``out[e] = <vectors[sources[e]], table[index[e]]>`` for entries ``[E]``."""
    if index.numel() == 0:
        return table.new_zeros(index.shape)
    # the offsets are not looked at in mode 0 (sum): every entry names its vector
    index, vectors = index.contiguous(), vectors.contiguous()
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(vectors, table, index, sources[:1], sources, 0)


def token_of_entry(index: Tensor) -> Tensor:
    """The token of each entry of ``index [P, K]``, flattened: ``0 0 .. 1 1 ..``."""
    return torch.arange(index.shape[0], device=index.device).repeat_interleave(index.shape[1])


class Segments(NamedTuple):
    """Entries sorted by the row they go to (``order``), cut where the row changes (``offsets``)."""

    rows: Tensor  # [R] the distinct rows, ascending
    offsets: Tensor  # [R + 1] into order
    order: Tensor  # [E] entries, by row and then as they came
    sources: Tensor  # [E] the vector of each sorted entry


def segment(index: Tensor, sources: Tensor) -> Segments:
    """Sort entries ``[E]``, which carry ``vectors[sources]`` to the rows ``index``, into segments of equal rows."""
    targets, order = index.sort(stable=True)
    rows, counts = torch.unique_consecutive(targets, return_counts=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Segments(rows, offsets, order, sources[order])


def add_to_rows_(table: Tensor, segments: Segments, coefficients: Tensor, vectors: Tensor) -> None:
    """``table[index[e]] += coefficients[e] * vectors[sources[e]]`` in place, each touched row read and written once."""
    if segments.order.numel() == 0:
        return
    sums = torch.nn.functional.embedding_bag(
        segments.sources,
        vectors,
        segments.offsets,
        per_sample_weights=coefficients.reshape(-1)[segments.order],
        mode="sum",
        include_last_offset=True,
    )
    table.index_add_(0, segments.rows, sums)
