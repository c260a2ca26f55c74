"""Sorted entries and what is added up by them: what writes and the gradients of reads are made of on a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.ops.kernels.segment_sum import segment_sum


class Segments(NamedTuple):
    """Entries sorted by the row they go to; how many rows there are, only the GPU knows."""

    targets: Tensor  # [E] int32 (or int64 where rows need it), ascending; outside the table: goes nowhere
    order: Tensor  # [E] entries, by row and then as they came
    sources: Tensor  # [E] the vector of each sorted entry


def segment(index: Tensor, n_rows: int) -> Segments:
    """Sort the entries of ``index [P, K]``, which carry vector ``p`` to rows of a table of ``n_rows``."""
    narrow = torch.int32 if n_rows < 1 << 31 else torch.int64  # sorting takes time by the byte
    targets, order = index.reshape(-1).to(narrow).sort(stable=True)
    return Segments(targets, order, order // index.shape[1])


def add_to_rows_(table: Tensor, segments: Segments, coefficients: Tensor, vectors: Tensor) -> None:
    """``table[index[p, j]] += coefficients[p, j] * vectors[p]`` in place, each touched row read and written once."""
    sorted_coefficients = coefficients.reshape(-1)[segments.order]
    segment_sum(table, segments.targets, segments.sources, sorted_coefficients, vectors)
