"""What a step costs, eager and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """A step's time, and the most that it holds beyond what was there before, in torch's tensors."""

    eager_seconds: float
    compiled_seconds: float
    eager_bytes: int
    compiled_bytes: int


def compare(eager: Callable[[], None], compiled: Callable[[], None], device: torch.device) -> Cost:
    """Medians of repeats that take turns, after a call of each that is not counted."""
    steps = (eager, compiled)
    for step in steps:
        step()
    seconds = [[_seconds(step, device) for step in steps] for _ in range(REPEATS)]
    eager_seconds, compiled_seconds = (median(times) for times in zip(*seconds, strict=True))
    eager_bytes, compiled_bytes = (peak_bytes(step, device) for step in steps)
    return Cost(eager_seconds, compiled_seconds, eager_bytes, compiled_bytes)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a step holds beyond what was there before, in torch's tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
