"""Interleaved repeats, what to say of them, and what the machine itself does in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Run = Callable[[], object]


def interleaved(runs: Mapping[str, Run], repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of every repeat: all runs once, then all of them again, so that what disturbs one disturbs the others."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    if warm_up:
        for run in runs.values():
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turn(runs: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of ``repeats`` of all that take less than a second, and of three (or two, from five seconds on) others.

    Their repeats are spread evenly over each other's, so that what disturbs one disturbs the others. The first run
    warms up; of what is slow it counts.
    """
    first = interleaved(runs, 1, warm_up=False)
    seconds = {name: [] if found[0] < 1 else found for name, found in first.items()}
    wanted = {
        name: repeats if found[0] < 1 else min(repeats, 3 if found[0] < 5 else 2) for name, found in first.items()
    }
    for i in range(repeats):
        now = {name: run for name, run in runs.items() if len(seconds[name]) * repeats < wanted[name] * (i + 1)}
        for name, found in interleaved(now, 1, warm_up=False).items():
            seconds[name] += found
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, and the number of repeats."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"seconds": middle, "quartiles": [low, high], "repeats": len(seconds)}


def growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent ``e`` of ``cost ~ size ** e``, a least-squares fit of the logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(costs), 1)
    return float(slope)


class Machine:
    """The two rates that bound the memory, measured among the other runs: a large copy, a float32 matrix product."""

    def __init__(self, megabytes: int = 256, width: int = 1024) -> None:
        self._source = torch.rand(megabytes * 2**20 // 4)
        self._target = torch.empty_like(self._source)
        self._matrix = torch.rand(width, width)

    def runs(self) -> dict[str, Run]:
        return {
            "copy": lambda: self._target.copy_(self._source),
            "product": lambda: self._matrix @ self._matrix,
        }

    def rates(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """GB/s (bytes read and written) and GFLOP/s of the medians."""
        copied, multiplied = (statistics.median(seconds[name]) for name in ("copy", "product"))
        return {
            "copy_gb_per_second": 2 * self._source.nbytes / copied / 1e9,
            "product_gflop_per_second": 2 * self._matrix.shape[0] ** 3 / multiplied / 1e9,
        }
