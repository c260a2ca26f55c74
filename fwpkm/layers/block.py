"""A decoder block: memory, token mixer, MLP."""

from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from fwpkm.layers.fwpkm import FwPKM, LayerResult, LayerState


class BlockResult(NamedTuple):
    """A block's output and, if it has a memory, what that did."""

    hidden: Tensor
    memory: LayerResult | None


class DecoderBlock(GradientCheckpointingLayer):
    """transformers' Qwen3 decoder layer with, optionally, a memory before its attention.

    Args:
        config: a transformers configuration with Qwen3's fields.
        layer_idx: which block this is; ``config.layer_types[layer_idx]`` says how it attends.
        memory: the memory layer, or None.
    """

    def __init__(self, config: Any, layer_idx: int, memory: FwPKM | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.mixer_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = Qwen3Attention(config, layer_idx)
        self.mlp_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, hidden: Tensor, memory_state: LayerState | None = None, **attention: Any) -> BlockResult:
        """``hidden [B, T, D]``; ``attention``: the arguments of transformers' attention modules."""
        result = None
        if self.memory is not None:
            result = self.memory.read_and_write(hidden, memory_state)
            hidden = result.hidden
        hidden = hidden + self.mixer(self.mixer_norm(hidden), **attention)[0]
        return BlockResult(hidden + self.mlp(self.mlp_norm(hidden)), result)
