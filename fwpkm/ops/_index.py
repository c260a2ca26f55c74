"""A write log sorted by the rows it wrote to: what reads many records without looking at all of them, on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require, require_dtype, require_shape
from fwpkm.ops._rows import add_to_rows_, segment


class Level(NamedTuple):
    """What some records of ``M`` memories wrote, sorted by slot; slot ``s`` of memory ``m`` is number ``m * N + s``."""

    keys: Tensor  # [E] int64, ascending: the slot that an entry wrote to
    records: Tensor  # [E] int64: the record, of the same memory, with the residual that it added
    weights: Tensor  # [E]: times what: coefficients divided by N_s
    sum_keys: Tensor  # [H] int64, ascending, each once: slots written so often that it was added up
    sums: Tensor  # [H, Dv]


class IndexedLog(NamedTuple):
    """Records in the form of levels, each of other records; outside autograd."""

    n_slots: int  # N
    residuals: Tensor  # [M, R, Dv], dtype of the values or bfloat16
    levels: tuple[Level, ...]


def check_indexed(log: IndexedLog, memories: int, values: Tensor) -> None:
    """Shapes and dtypes; what the numbers in it are is not looked at."""
    fits = log.n_slots >= 1 and values.shape[0] % log.n_slots == 0
    require(fits, "log.n_slots", log.n_slots, "a divisor of the {} rows of values", values.shape[0])
    require_shape("log.residuals", log.residuals, (memories, "R", values.shape[1]))
    require_dtype("log.residuals", log.residuals, values.dtype, torch.bfloat16)
    for i, level in enumerate(log.levels):
        name = f"log.levels[{i}]"
        require_shape(f"{name}.keys", level.keys, ("E",))
        require_shape(f"{name}.records", level.records, level.keys.shape)
        require_shape(f"{name}.weights", level.weights, level.keys.shape)
        require_shape(f"{name}.sum_keys", level.sum_keys, ("H",))
        require_shape(f"{name}.sums", level.sums, (level.sum_keys.numel(), values.shape[1]))
        for field in ("keys", "records", "sum_keys"):
            require_dtype(f"{name}.{field}", getattr(level, field), torch.int64)
        for field in ("weights", "sums"):
            require_dtype(f"{name}.{field}", getattr(level, field), values.dtype)


def add_indexed_(working: Tensor, keys: Tensor, log: IndexedLog) -> None:
    """Add to ``working [W, Dv]`` what the log wrote to the slots ``keys [W]``, numbered as in :class:`Level`; each
    slot is there once, and -1 stands for none.
    """
    found = [_entries(keys, level) for level in log.levels]
    rows, records, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    records += keys[rows] // log.n_slots * log.residuals.shape[1]
    table = log.residuals.flatten(0, 1)
    if table.dtype != working.dtype:
        used, records = records.unique(return_inverse=True)
        table = table[used].to(working.dtype)
    add_to_rows_(working, segment(rows, records), weights, table)
    for level in log.levels:
        if level.sum_keys.numel():
            place = torch.searchsorted(level.sum_keys.contiguous(), keys).clamp_max_(level.sum_keys.numel() - 1)
            hit = (level.sum_keys[place] == keys).nonzero().squeeze(-1)
            working.index_add_(0, hit, level.sums[place[hit]])


def _entries(keys: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
    """The level's entries with one of ``keys [W]``: which of these, the record, the weight."""
    first, end = torch.searchsorted(level.keys.contiguous(), torch.stack((keys, keys + 1)))
    counts = end - first
    rows = torch.arange(keys.numel(), device=keys.device).repeat_interleave(counts)
    entry = torch.arange(rows.numel(), device=keys.device) + (first - counts.cumsum(0) + counts)[rows]
    return rows, level.records[entry], level.weights[entry]
