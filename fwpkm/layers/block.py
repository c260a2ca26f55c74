"""A decoder block: memory, token mixer, MLP."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from fwpkm.checks import require
from fwpkm.layers.delta_net import GatedDeltaNet
from fwpkm.layers.fwpkm import FwPKM, LayerResult, LayerState
from fwpkm.layers.host import CACHE
from fwpkm.layers.mixers import FLASH_LINEAR, FlashLinearAttention
from fwpkm.layers.pkm import ProductKeyMemory
from fwpkm.layers.repetition import SharedStart, under_checkpoint


class BlockResult(NamedTuple):
    """A block's output, what its memory did (if it has one), and how its attention weighed, if that is known.

    Gradients go through tensors that are fields: a reentrant checkpoint sees no others.
    """

    hidden: Tensor  # [B, T, D]
    memory: LayerResult | None
    gate: Tensor | None  # [B, T], of the memory
    addressing_loss: Tensor | None  # scalar, of the memory
    attention: Tensor | None  # [B, heads, T, S]


class DecoderBlock(GradientCheckpointingLayer):
    """A token mixer and an MLP, each after a norm and added to its input, with, optionally, a memory before them.

    The modules have the names that transformers' decoder layers have. The mixer is ``self_attn``, Qwen3's attention, or
    ``linear_attn``: a :class:`GatedDeltaNet` for ``"linear_attention"``, for ``"fla:<layer>"`` one of
    flash-linear-attention. In the blocks of ``config.pkm_layers`` a :class:`ProductKeyMemory` stands in the place of
    the MLP.

    Args:
        config: a :class:`fwpkm.models.FwPKMConfig`.
        layer_idx: which block this is.
        memory: the memory layer, or None.
    """

    def __init__(self, config: Any, layer_idx: int, memory: FwPKM | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        mixer = _mixer(config, layer_idx)
        self.self_attn = mixer if isinstance(mixer, Qwen3Attention) else None
        self.linear_attn = None if isinstance(mixer, Qwen3Attention) else mixer
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = product_key_memory(config) if layer_idx in config.pkm_layers else Qwen3MLP(config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; under ``gradient_checkpointing`` from a checkpoint, unless a cache is to be continued."""
        continues = kwargs.get("cache") is not None  # which a repetition would do twice
        return nn.Module.__call__(self, *args, **kwargs) if continues else super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden: Tensor,
        memory_state: LayerState | SharedStart | None = None,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        cache: Any = None,
        **attention: Any,
    ) -> BlockResult:
        """Read a piece of ``B`` rows.

        Args:
            hidden: ``[B, T, D]``.
            memory_state: where the memory stopped reading, or what its :meth:`FwPKM.begin` gave.
            mask: ``[B, T]`` bool, false at tokens to skip.
            starts: ``[B, T]`` bool, true where a sequence begins inside a row.
            cache: transformers' cache.
            attention: further arguments of transformers' attention modules: positions, and a mask that says what
                ``mask`` and ``starts`` say.

        Raises:
            ValueError: for a cache under an activation checkpoint that is not :meth:`__call__`'s own.
        """
        result = gate = loss = None
        if cache is not None and self.training and not torch.compiler.is_compiling():
            require(under_checkpoint() is None, "cache", "given", "None under a checkpoint, which runs twice")
        if self.memory is not None:
            # What is in a cache lives there.
            result = self.memory(hidden, memory_state, mask, starts, persist=cache is None)
            hidden, gate, loss = result.hidden, result.gate, result.memory.addressing_loss
        mixed, weights = self.input_layernorm(hidden), None
        if self.self_attn is not None:
            mixed, weights = self.self_attn(mixed, **{CACHE: cache}, **attention)
        elif self.linear_attn is not None:
            mixed = self.linear_attn(mixed, cache, mask, starts)
        hidden = hidden + mixed
        return BlockResult(hidden + self.mlp(self.post_attention_layernorm(hidden)), result, gate, loss, weights)


def _mixer(config: Any, layer_idx: int) -> nn.Module:
    kind = config.layer_types[layer_idx]
    if kind.startswith(FLASH_LINEAR):
        options = (config.fla_options or {}).get(kind.removeprefix(FLASH_LINEAR), {})
        return FlashLinearAttention(kind, config.hidden_size, layer_idx, **options)
    mixer: nn.Module = (GatedDeltaNet if kind == "linear_attention" else Qwen3Attention)(config, layer_idx)
    return mixer


def product_key_memory(config: Any) -> ProductKeyMemory:
    """A product-key memory as ``config`` (a :class:`fwpkm.models.FwPKMConfig`) describes it."""
    return ProductKeyMemory(
        config.hidden_size,
        n_subkeys=config.pkm_n_subkeys,
        key_dim=config.pkm_key_dim,
        value_dim=config.pkm_value_dim,
        heads=config.pkm_heads,
        topk=config.pkm_topk,
    )
