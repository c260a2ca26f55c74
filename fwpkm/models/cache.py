"""What a model keeps of the sequences that it is reading."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import DynamicCache

from fwpkm.checks import require
from fwpkm.layers.delta_net import DeltaLayer
from fwpkm.layers.fwpkm import LayerState
from fwpkm.layers.mixers import FLASH_LINEAR
from fwpkm.layers.window import WindowLayer
from fwpkm.memory import MemoryState
from fwpkm.memory.trail import require_reach
from fwpkm.models.configuration import FwPKMConfig


class FwPKMCache(DynamicCache):
    """The token mixers' states, and the memories: ``generate`` makes one, and beams, crops and copies go through it.

    Attributes:
        memories: the state of each memory layer, by the number of its block.
        tokens: read so far, masked ones included.
        padded: whether some of them were masked.
    """

    def __init__(self, config: FwPKMConfig) -> None:
        for kind in config.layer_types or ():
            known = not kind.startswith(FLASH_LINEAR)
            require(known, "use_cache", True, "False with layer type {!r}, which keeps no state of ours", kind)
        super().__init__(config=config)
        for i, kind in enumerate(config.layer_types or ()):
            if kind == "sliding_attention":
                assert config.sliding_window is not None
                self.layers[i] = WindowLayer(config.sliding_window)
            elif kind == "linear_attention":
                self.layers[i] = DeltaLayer()
        self.memories: dict[int, LayerState] = {}
        self.tokens = 0
        self.padded = False

    @classmethod
    def remembering(cls, config: FwPKMConfig, memories: Mapping[int, MemoryState]) -> FwPKMCache:
        """The beginning of a text, for a model that remembers others: attention and convolutions have seen nothing."""
        cache = cls(config)
        cache.memories = {i: LayerState(state, None) for i, state in memories.items()}
        return cache

    @property
    def is_compileable(self) -> bool:
        """Not by ``generate`` on its own: the memories' states grow."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, masked ones included (transformers' own knows no length without attention layers)."""
        return self.tokens

    def flush(self) -> None:
        """Commit every memory's open chunk now, so that what it holds can be read: :meth:`fwpkm.MemoryState.flush`."""
        self.memories = {i: state._replace(memory=state.memory.flush()) for i, state in self.memories.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``b`` goes on from what row ``beam_idx[b]`` has read."""
        self._select(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._select(indices)
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.memories:
            rows = next(iter(self.memories.values())).memory.memories
            self._select(torch.arange(rows).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def will_read(self, length: int, mask: Tensor | None) -> None:
        """Say which tokens the next call reads: ``length`` a row, and ``mask [B, S]`` of them and all before is true
        at real ones (None: all are). Windows keep what they will need.
        """
        for layer in self.layers:
            if isinstance(layer, WindowLayer):
                layer.will_read(length, mask)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (transformers gives a negative number), at any place.

        Raises:
            ValueError: for more than the last 128 tokens, or than were read with this cache, outside training and
                compiled graphs. Nothing is cropped.
        """
        require(tokens_to_remove <= 0, "tokens_to_remove", tokens_to_remove, "0, or minus the tokens to take back")
        tokens = -tokens_to_remove
        reaches = [layer.reach for layer in self.layers if isinstance(layer, WindowLayer | DeltaLayer)]
        require_reach(tokens, min([self.tokens, *reaches]))
        cropped = {i: state.crop(tokens) for i, state in self.memories.items()}
        super().crop(tokens_to_remove)
        self.memories, self.tokens = cropped, self.tokens - tokens

    def detach(self) -> FwPKMCache:
        """Cut everything it holds from the graph that computed it, for truncated backpropagation; returns itself."""
        for layer in self.layers:
            layer.__dict__.update(tree_map_only(Tensor, Tensor.detach, layer.__dict__))
        self.memories = {i: state.detach() for i, state in self.memories.items()}
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FwPKMCache:
        """Another cache of the same contents; gradients go back through either."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        for x in tree_leaves(([layer.__dict__ for layer in self.layers], self.memories)):
            if isinstance(x, Tensor) and x.grad_fn is not None:  # which torch would not copy
                memo[id(x)] = x.clone()
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.memories, self.tokens, self.padded = {}, 0, False

    def _select(self, indices: Tensor) -> None:
        self.memories = {i: state.select(indices) for i, state in self.memories.items()}
