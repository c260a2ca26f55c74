"""How many slots requests have touched, in vLLM's log: whether memories have slots enough, or too many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from fwpkm_vllm.paged import Pages

INTERVAL = 10.0  # seconds between lines

logger = init_logger("vllm.fwpkm")


class SlotsTouched:
    """Counts, and says from time to time what was counted, without waiting for a GPU.

    Args:
        n_slots: of a memory.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.counting: list[tuple[Tensor, Any]] = []  # on their way to the host, and when they are there
        self.shares: list[float] = []
        self.said = time.monotonic()

    def count(self, log: Pages, due: Sequence[tuple[int, int]]) -> None:
        """Count the distinct slots of the records that requests have in ``log``, ``due`` says which and how many."""
        for request, tokens in due:
            record = torch.arange(tokens, device=log.table.device)
            slots = log.read("slots", torch.full_like(record, request), record).flatten().sort().values
            host = torch.empty((), dtype=torch.int64, pin_memory=slots.is_cuda)
            host.copy_((slots.diff() != 0).sum() + 1, non_blocking=True)
            done = torch.cuda.Event() if slots.is_cuda else None
            if done is not None:
                done.record()
            self.counting.append((host, done))
        while self.counting and (self.counting[0][1] is None or self.counting[0][1].query()):
            self.shares.append(int(self.counting.pop(0)[0]) / self.n_slots)
        if self.shares and time.monotonic() - self.said >= INTERVAL:
            logger.info(
                "Slots that a request has touched in a memory layer, counted after 1, 2, 4, ... chunks: %.2f%% of %d on"
                " average, %.2f%% at most (%d counts)",
                100 * sum(self.shares) / len(self.shares),
                self.n_slots,
                100 * max(self.shares),
                len(self.shares),
            )
            self.shares, self.said = [], time.monotonic()
