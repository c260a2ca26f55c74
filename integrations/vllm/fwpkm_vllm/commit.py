"""``commit_after_prompt``: requests whose memories commit where their prompt ends (:meth:`fwpkm.MemoryState.flush`).

vLLM tells a model nothing about a request but its tokens. It does tell logits processors, before every forward, whose
requests stand in which row of the batch; so this one changes no logits, and remembers where prompts end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from fwpkm.checks import require

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NAME = "commit_after_prompt"


class CommitAfterPrompt(LogitsProcessor):
    """Where the memories of the requests in each row of the batch commit early."""

    refused: ClassVar[str | None] = None  # what is expected instead, where it is not served
    current: ClassVar[CommitAfterPrompt | None] = None  # of this process, which runs one model

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.origins = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int64)
        self.asked = False
        CommitAfterPrompt.current = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what is no flag, and commits where something relies on where chunks end."""
        asked = (sampling_params.extra_args or {}).get(NAME, False)
        require(asked in (0, 1), NAME, repr(asked), "true or false")  # vLLM's HTTP interface makes a number of a flag
        require(not asked or cls.refused is None, NAME, asked, "{}", cls.refused)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows; vLLM calls this before each forward."""
        if batch_update is None:
            return
        origins = self.origins
        for row in batch_update.removed:
            origins[row] = 0
        for row, params, prompt, _ in batch_update.added:
            asked = (params.extra_args or {}).get(NAME, False)
            origins[row] = len(prompt) if asked and prompt is not None else 0
        for source, target, direction in batch_update.moved:
            there = origins[target].clone()
            origins[target] = origins[source]
            origins[source] = there if direction == MoveDirectionality.SWAP else 0
        self.asked = bool(origins.any())

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits


def origins(requests: int, device: torch.device) -> Tensor | None:
    """Where the memories of the batch's ``requests`` commit early, or None if none does."""
    current: Any = CommitAfterPrompt.current
    if current is None or not current.asked:
        return None
    return current.origins[:requests].to(device, non_blocking=True)
