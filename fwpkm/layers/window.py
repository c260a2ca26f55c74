"""What a cache keeps of an attention that sees a window of the last tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fwpkm.memory.trail import REACH


class WindowLayer(DynamicLayer):
    """Keys and values of the last columns, as far back as a window can reach once tokens were taken back.

    Attributes:
        sliding_window: tokens that a token sees, itself included.
        seen: columns read so far.
        first: the first of them that is kept after the next call; 0 for all.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.seen = self.first = 0

    @property
    def offset(self) -> int:
        """The first column that is kept."""
        return self.seen - (self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0)

    @property
    def reach(self) -> int:
        """How many columns can be taken back."""
        return REACH if self.offset else self.seen

    def will_read(self, length: int, mask: Tensor | None) -> None:
        """Say that the next call reads ``length`` columns, of which, and of those before, the ``mask`` are real.

        A row's window is its last real columns, wherever they are: those before the first that some row may still ask
        for are dropped. A graph, which cannot look, keeps them all.
        """
        certain = self.seen + length - REACH  # columns that will not be taken back
        kept = self.sliding_window - 1
        if mask is None:
            self.first = max(self.first, certain - kept)
        elif not torch.compiler.is_compiling() and certain > 0:
            real = mask[:, :certain]
            after = real.flip(1).cumsum(1).flip(1) - real.long()
            asked = (real & (after < kept)).any(0)
            self.first = max(self.first, int(asked.long().argmax()) if bool(asked.any()) else certain)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns, and return all that these may see."""
        offset = self.offset
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[2]
        dropped = max(0, self.first - offset)
        self.keys, self.values = keys[:, :, dropped:], values[:, :, dropped:]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns the next call sees, and which is the first."""
        return self.seen - self.offset + query_length, self.offset

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` columns, at most :attr:`reach`."""
        if tokens_to_remove:
            super().crop(tokens_to_remove)
            self.seen += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = self.first = 0
