"""A hybrid language model: transformers' attention blocks, some with a memory that is written while the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from fwpkm.checks import require_dtype, require_shape
from fwpkm.layers.block import DecoderBlock
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.layers.fwpkm import FwPKM, LayerState
from fwpkm.models.configuration import FwPKMConfig


class FwPKMCache(DynamicCache):
    """What the model keeps of the sequences it is reading: the attention's keys and values, and the memories."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config=config)
        self.memories: dict[int, LayerState] = {}


@dataclass
class FwPKMOutput(CausalLMOutputWithPast):
    """transformers' causal LM output, and what the memories did.

    Attributes:
        token_loss: mean cross entropy of the next tokens, ``loss`` without its extras.
        addressing_loss: mean over the memory layers (with ``fwpkm_key_update="slow"`` a part of ``loss``).
        gates: ``[B, T]`` of each memory layer.
        slots: ``[B, T, H * k]`` of each memory layer.
    """

    token_loss: Tensor | None = None
    addressing_loss: Tensor | None = None
    gates: tuple[Tensor, ...] | None = None
    slots: tuple[Tensor, ...] | None = None


class FwPKMPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading."""

    config: FwPKMConfig
    config_class = FwPKMConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FwPKM):
            module.reset_fast_weights()
        elif isinstance(module, CausalConvolution):
            module.reset_parameters()


class FwPKMForCausalLM(FwPKMPreTrainedModel, GenerationMixin):
    """A causal language model whose memory layers write what they read.

    A forward changes none of the model's tensors: memories start from the checkpoint, belong to the sequences of the
    call, and live on in ``past_key_values`` when it is passed on.
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, i, _memory(config) if i in (config.fwpkm_layers or ()) else None)
            for i in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = Qwen3RotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Under torch's DistributedDataParallel each process keeps the memories it has: they are not sent around.
        self._ddp_params_and_buffers_to_ignore = [
            f"{name}.{buffer}"
            for name, module in self.named_modules()
            if isinstance(module, FwPKM)
            for buffer, _ in module.named_buffers(recurse=False)
        ]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: FwPKMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> FwPKMOutput:
        """Read a piece of ``B`` sequences.

        Args:
            input_ids: ``[B, T]`` int64.
            past_key_values: where an earlier call on the same sequences stopped (its ``past_key_values``); updated.
            labels: ``[B, T]``, usually ``input_ids``: ``loss`` is the mean cross entropy of each next token (-100:
                left out), plus, with ``fwpkm_key_update="slow"``, the addressing loss, and ``fwpkm_gate_weight`` times
                the mean gate.
            use_cache: return ``past_key_values`` also if none came in.
            logits_to_keep: logits of the last so many tokens only; 0 for all.
        """
        require_shape("input_ids", input_ids, ("B", "T"))
        require_dtype("input_ids", input_ids, torch.int64, torch.int32)
        if past_key_values is None and use_cache:
            past_key_values = FwPKMCache(self.config)
        hidden = self.embed_tokens(input_ids)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        layer_types = self.config.layer_types or []
        masks = self._masks(layer_types, hidden, past_key_values, positions)
        position_embeddings = self.rotary(hidden, positions)
        results = []
        for i, block in enumerate(self.blocks):
            hidden, memory = block(
                hidden,
                memory_state=None if past_key_values is None else past_key_values.memories.get(i),
                position_embeddings=position_embeddings,
                attention_mask=masks[layer_types[i]],
                past_key_values=past_key_values,
            )
            if memory is not None:
                results.append(memory)
                if past_key_values is not None:
                    past_key_values.memories[i] = memory.state
        logits = self.lm_head(self.norm(hidden)[:, -logits_to_keep:])
        addressing_loss = torch.stack([r.memory.addressing_loss for r in results]).mean() if results else None
        token_loss: Tensor | None = None
        if labels is not None:
            require_shape("labels", labels, input_ids.shape)
            token_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        loss = token_loss
        if loss is not None:
            if addressing_loss is not None and self.config.fwpkm_key_update == "slow":
                loss = loss + self.config.fwpkm_addressing_weight * addressing_loss
            if results and self.config.fwpkm_gate_weight:
                loss = loss + self.config.fwpkm_gate_weight * torch.stack([r.gate for r in results]).mean()
        return FwPKMOutput(
            loss=loss,
            token_loss=token_loss,
            logits=logits,
            past_key_values=past_key_values,
            addressing_loss=addressing_loss,
            gates=tuple(r.gate for r in results),
            slots=tuple(r.memory.slots for r in results),
        )

    def _masks(
        self, layer_types: list[str], hidden: Tensor, cache: FwPKMCache | None, positions: Tensor
    ) -> dict[str, Tensor | None]:
        """The attention mask of each layer type in use; ``layer_idx`` says whose cache its size is taken from."""
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: make[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=cache,
                position_ids=positions,
                layer_idx=layer_types.index(kind),
            )
            for kind in set(layer_types)
        }


def _memory(config: FwPKMConfig) -> FwPKM:
    return FwPKM(
        config.hidden_size,
        n_subkeys=config.fwpkm_n_subkeys,
        key_dim=config.fwpkm_key_dim,
        value_dim=config.fwpkm_value_dim,
        heads=config.fwpkm_heads,
        query_conv=config.fwpkm_query_conv,
        config=config.memory_config(),
    )
