"""A hybrid language model: transformers' attention blocks, some with a memory that is written while the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from fwpkm.checks import require, require_dtype, require_shape
from fwpkm.layers.block import DecoderBlock
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.layers.delta_net import GatedDeltaNet
from fwpkm.layers.fwpkm import FwPKM
from fwpkm.layers.weights import MemoryWeights
from fwpkm.models.cache import FwPKMCache
from fwpkm.models.configuration import FwPKMConfig
from fwpkm.models.placement import attention_masks, place
from fwpkm.ops import keep_addresses

_PIECE = 4096  # tokens read at once


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
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryWeights):
            module.reset_memory()
        elif isinstance(module, CausalConvolution | GatedDeltaNet):
            module.reset_parameters()


class FwPKMForCausalLM(FwPKMPreTrainedModel, GenerationMixin):
    """A causal language model whose memory layers write what they read.

    A forward changes none of the model's tensors: memories start from the checkpoint, belong to the sequences of the
    call, and live on in ``past_key_values`` when it is passed on. With ``fwpkm_scope="shared"`` a training forward
    writes to one memory of the whole batch instead, which :meth:`commit` writes into the model: the next training
    forward does so when it starts, and so does saving.
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, i, memory_layer(config) if i in (config.fwpkm_layers or ()) else None)
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

    def commit(self) -> None:
        """Write what the last training forward stored in ``shared`` memories into the model."""
        for memory in self.memories():
            memory.commit()

    def discard(self) -> None:
        """Forget what the last training forward stored in ``shared`` memories."""
        for memory in self.memories():
            memory.discard()

    @torch.no_grad()
    def read(self, input_ids: Tensor, past_key_values: FwPKMCache) -> None:
        """Read ``[B, T]`` tokens, of which there may be none, into ``past_key_values``, in pieces."""
        for piece in input_ids.split(_PIECE, 1) if input_ids.shape[1] else ():
            self(piece, past_key_values=past_key_values, logits_to_keep=1)

    def checkpoint_blocks(self) -> None:
        """Keep a block's input and its addresses in training, and compute the rest once more in the backward."""
        renamed = hasattr(self, "activation_checkpointing_enable")  # by transformers, on the way
        enable = self.activation_checkpointing_enable if renamed else self.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": keep_addresses})

    def memories(self) -> list[FwPKM]:
        """The memory layers, in their order."""
        return [module for module in self.modules() if isinstance(module, FwPKM)]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FwPKMCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        commit_after_prompt: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``generate`` calls :meth:`forward` with.

        ``generate(..., commit_after_prompt=True)`` commits the memories after the prompt. Without it, what the prompt's
        last, incomplete chunk says can be read back only once generation has filled that chunk; attention sees it
        as ever.
        """
        if attention_mask is not None:  # looked at for prompts, not for every token
            one_more = past_key_values is not None and past_key_values.tokens + 1 == input_ids.shape[1]
            padded = past_key_values.padded if past_key_values and one_more else not attention_mask.all()
            attention_mask = attention_mask if padded else None
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if commit_after_prompt:
            require(past_key_values is not None, "commit_after_prompt", True, "a cache, which keeps what is committed")
            inputs["commit_partial"] = bool(is_first_iteration)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        kind = generation_config.cache_implementation
        require(kind in (None, "dynamic"), "cache_implementation", kind, "None: the model brings its own cache")
        require(
            given is None or isinstance(given, FwPKMCache),
            "past_key_values",
            type(given).__name__,
            "a FwPKMCache, which holds the memories too",
        )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = FwPKMCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FwPKMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        commit_partial: bool = False,
        **kwargs: Any,
    ) -> FwPKMOutput:
        """Read a piece of ``B`` sequences.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, S]``, 1 (or True) at real tokens, over the ``S - T`` tokens of earlier calls and
                these; None if all are. What masked tokens give has no meaning, and they change nothing.
            position_ids: ``[B, T]``, by default those of the real tokens of a row. Where they do not count up by one,
                another sequence begins, and sees nothing of those before it in the row, except through a ``shared``
                memory in training (without ``attention_mask`` and ``past_key_values`` only).
            past_key_values: where an earlier call on the same sequences stopped (its ``past_key_values``); updated.
            labels: ``[B, T]``, usually ``input_ids``: ``loss`` is the mean cross entropy of each next token (-100:
                left out), plus, with ``fwpkm_key_update="slow"``, the addressing loss, and ``fwpkm_gate_weight`` times
                the mean gate.
            use_cache: return ``past_key_values`` also if none came in.
            logits_to_keep: logits of the last so many tokens only; 0 for all.
            commit_partial: commit the memories' open chunks after these tokens (into ``past_key_values``).
        """
        if self.training and not _repeated():
            self.commit()
        require_shape("input_ids", input_ids, ("B", "T"))
        require_dtype("input_ids", input_ids, torch.int64, torch.int32)
        if past_key_values is None and use_cache:
            past_key_values = FwPKMCache(self.config)
        hidden = self.embed_tokens(input_ids)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        placement = place(input_ids, past, attention_mask, position_ids, cached=past_key_values is not None)
        layer_types = self.config.layer_types or []
        masks = attention_masks(self.config, hidden, past_key_values, placement)
        position_embeddings = self.rotary(hidden, placement.positions)
        results = []
        for i, block in enumerate(self.blocks):
            hidden, memory = block(
                hidden,
                memory_state=None if past_key_values is None else past_key_values.memories.get(i),
                mask=placement.mask,
                starts=placement.starts,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                attention_mask=masks.get(layer_types[i]),
            )
            if memory is not None:
                results.append(memory)
                if past_key_values is not None:
                    past_key_values.memories[i] = memory.state
        if past_key_values is not None:
            past_key_values.tokens += input_ids.shape[1]
            past_key_values.padded |= placement.attention_mask is not None
            if commit_partial:
                past_key_values.flush()
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
                gates = torch.stack([r.gate for r in results])
                loss = loss + self.config.fwpkm_gate_weight * _mean(gates, placement.mask)
        return FwPKMOutput(
            loss=loss,
            token_loss=token_loss,
            logits=logits,
            past_key_values=past_key_values,
            addressing_loss=addressing_loss,
            gates=tuple(r.gate for r in results),
            slots=tuple(r.memory.slots for r in results),
        )


def _repeated() -> bool:
    """Whether an activation checkpoint runs this forward once more, in a backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _mean(gates: Tensor, mask: Tensor | None) -> Tensor:
    """Of ``[layers, B, T]``, over the tokens that are not masked."""
    return gates.mean() if mask is None else torch.where(mask, gates, 0).sum() / (mask.sum() * gates.shape[0])


def memory_layer(config: FwPKMConfig) -> FwPKM:
    """A memory layer as ``config`` describes it."""
    return FwPKM(
        config.hidden_size,
        n_subkeys=config.fwpkm_n_subkeys,
        key_dim=config.fwpkm_key_dim,
        value_dim=config.fwpkm_value_dim,
        heads=config.fwpkm_heads,
        query_conv=config.fwpkm_query_conv,
        config=config.memory_config(),
        learn_initial_values=config.fwpkm_learn_initial_values,
    )
