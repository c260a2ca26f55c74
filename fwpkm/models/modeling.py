"""A hybrid language model: transformers' attention blocks, some with a memory that is written while the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from fwpkm.checks import require, require_dtype, require_shape
from fwpkm.layers.block import BlockResult, DecoderBlock
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.layers.delta_net import GatedDeltaNet
from fwpkm.layers.fwpkm import FwPKM
from fwpkm.layers.host import CACHE, one_cache
from fwpkm.layers.mixers import WINDOWED
from fwpkm.layers.repetition import is_repeated
from fwpkm.layers.weights import MemoryWeights
from fwpkm.models.cache import FwPKMCache
from fwpkm.models.configuration import FwPKMConfig
from fwpkm.models.generation import FwPKMGenerationMixin
from fwpkm.models.placement import attention_masks, place
from fwpkm.ops import keep_addresses

logger = logging.get_logger(__name__)

_PIECE = 4096  # tokens read at once
ATTENTION_REFUSED = {
    "paged|": "memories are in no pages of continuous batching",
    "flex_attention": "masks of windows and packed rows are not tried with it",
    "flash_attention": "it has no masks with holes, which memories take",
}


@dataclass
class FwPKMModelOutput(BaseModelOutputWithPast):
    """transformers' output of a decoder without a head, and, if asked for, what the memories did.

    Attributes:
        gates: ``[B, T]`` of each memory layer.
        slots: ``[B, T, H * k]`` of each memory layer.
        addressing_loss: mean over the memory layers.
        mean_gate: of all memory layers and unmasked tokens.
    """

    gates: tuple[Tensor, ...] | None = None
    slots: tuple[Tensor, ...] | None = None
    addressing_loss: Tensor | None = None
    mean_gate: Tensor | None = None


@dataclass
class FwPKMOutput(CausalLMOutputWithPast):
    """transformers' output of a causal language model, what ``loss`` is made of in training, and, if asked for, what
    the memories did.

    Attributes:
        token_loss: in training, the cross entropy of the next tokens: ``loss`` without its further terms.
        addressing_loss: in training, the mean over the memory layers (with ``fwpkm_key_update="slow"`` a term of
            ``loss``).
        mean_gate: in training, of all memory layers and unmasked tokens (with ``fwpkm_gate_weight`` a term of
            ``loss``).
        gates: ``[B, T]`` of each memory layer, with ``output_memories``.
        slots: ``[B, T, H * k]`` of each memory layer, with ``output_memories``.
    """

    token_loss: Tensor | None = None
    addressing_loss: Tensor | None = None
    mean_gate: Tensor | None = None
    gates: tuple[Tensor, ...] | None = None
    slots: tuple[Tensor, ...] | None = None


class FwPKMPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading, and the memories of whatever stands on the backbone."""

    config: FwPKMConfig
    config_class = FwPKMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryWeights):
            module.reset_memory()
        elif isinstance(module, CausalConvolution | GatedDeltaNet):
            module.reset_parameters()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The attention implementation: torch's, by windows where there are some, unless another is asked for."""
        asked = WINDOWED if requested_attention is None else requested_attention
        return super().get_correct_attn_implementation(asked, is_init_check)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        for kind, reason in ATTENTION_REFUSED.items():
            refused = (attn_implementation or "").startswith(kind)
            require(not refused, "attn_implementation", attn_implementation, "eager, sdpa or windowed_sdpa: {}", reason)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Under torch's DistributedDataParallel each process keeps the memories it has: they are not sent around."""
        return [
            f"{name}.{buffer}"
            for name, module in self.named_modules()
            if isinstance(module, FwPKM)
            for buffer, _ in module.named_buffers(recurse=False)
        ]

    def memories(self) -> list[FwPKM]:
        """The memory layers, in their order."""
        return [module for module in self.modules() if isinstance(module, FwPKM)]

    def commit(self) -> None:
        """Write what the last training forward stored in ``shared`` memories into the model."""
        for memory in self.memories():
            memory.commit()

    def discard(self) -> None:
        """Forget what the last training forward stored in ``shared`` memories."""
        for memory in self.memories():
            memory.discard()

    def checkpoint_blocks(self) -> None:
        """Keep a block's input and its addresses in training, and compute the rest once more in the backward."""
        renamed = hasattr(self, "activation_checkpointing_enable")  # by transformers, on the way
        enable = self.activation_checkpointing_enable if renamed else self.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": keep_addresses})


class FwPKMModel(FwPKMPreTrainedModel):
    """The language model without its head: embeddings, blocks, and a norm.

    A forward changes none of the model's tensors: memories start from the checkpoint, belong to the sequences of the
    call, and live on in its ``cache`` when that is passed on. With ``fwpkm_scope="shared"`` a training forward
    writes to one memory of the whole batch instead, which :meth:`commit` writes into the model: the next training
    forward does so when it starts, and so does saving.
    """

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderBlock(config, i, memory_layer(config) if i in (config.fwpkm_layers or ()) else None)
            for i in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: FwPKMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_memories: bool = False,
        commit_partial: bool = False,
        past_key_values: FwPKMCache | None = None,
    ) -> FwPKMModelOutput:
        """Read a piece of ``B`` sequences.

        Args:
            input_ids: ``[B, T]`` int64 or int32.
            attention_mask: ``[B, S]``, 1 (or True) at real tokens, over the ``S - T`` tokens of earlier calls and
                these; None if all are. What masked tokens give has no meaning, and they change nothing.
            position_ids: ``[B, T]``, by default those of the real tokens of a row. Where they do not count up by one,
                another sequence begins, and sees nothing of those before it in the row, except through a ``shared``
                memory in training (without ``attention_mask`` and ``cache`` only).
            cache: where an earlier call on the same sequences stopped; updated. Its other name, ``past_key_values``, is
                that of transformers before 5.24; the output has the name that the installed transformers knows.
            inputs_embeds: ``[B, T, D]``, in the place of ``input_ids``.
            use_cache: return a cache also if none came in.
            output_attentions: return what each attention block weighed, ``[B, heads, T, S]``, which attention
                implementation ``"eager"`` alone knows: None, and a warning, with others.
            output_hidden_states: return ``[B, T, D]`` before each block and after the last norm.
            output_memories: return what the memories did.
            commit_partial: commit the memories' open chunks after these tokens (into ``cache``).

        Raises:
            ValueError: for a wrong shape or dtype, or both or neither of ``input_ids`` and ``inputs_embeds``.
        """
        if self.training and not is_repeated():
            self.commit()
        given = [name for name, x in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)) if x is not None]
        require(len(given) == 1, "input_ids, inputs_embeds", given or "neither given", "exactly one of them")
        if input_ids is not None:
            require_shape("input_ids", input_ids, ("B", "T"))
            require_dtype("input_ids", input_ids, torch.int64, torch.int32)
            hidden = self.embed_tokens(input_ids)
        else:
            assert inputs_embeds is not None
            require_shape("inputs_embeds", inputs_embeds, ("B", "T", self.config.hidden_size))
            hidden = inputs_embeds
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once("output_attentions needs attention implementation 'eager'; no attentions are returned")
        cache = one_cache(cache, past_key_values)
        if cache is None and use_cache:
            cache = FwPKMCache(self.config)
        past = 0 if cache is None else cache.get_seq_length()
        placement = place(hidden, past, attention_mask, position_ids, cached=cache is not None)
        layer_types = self.config.layer_types or []
        if cache is not None:
            cache.will_read(hidden.shape[1], placement.attention_mask)
        masks = attention_masks(self.config, hidden, cache, placement)
        position_embeddings = self.rotary_emb(hidden, placement.positions)
        weights, passed = [], [hidden]
        gates: list[Any] = []
        slots: list[Tensor] = []
        losses: list[Any] = []
        begins = self.training and self.config.fwpkm_scope == "shared" and cache is None
        blocks: list[Any] = list(self.layers)
        begun = [x.memory.begin() if begins and x.memory is not None else None for x in blocks]
        for i, (block, start) in enumerate(zip(blocks, begun, strict=True)):
            # A reentrant checkpoint makes a tuple of what it returns.
            result = BlockResult(
                *block(
                    hidden,
                    memory_state=start if cache is None else cache.memories.get(i),
                    mask=placement.mask,
                    starts=placement.starts,
                    cache=cache,
                    position_embeddings=position_embeddings,
                    attention_mask=masks.get(layer_types[i]),
                )
            )
            hidden = result.hidden
            if result.attention is not None:
                weights.append(result.attention)
            passed.append(hidden)
            if result.memory is not None:
                gates.append(result.gate)
                slots.append(result.memory.memory.slots)
                losses.append(result.addressing_loss)
                if start is not None:
                    start.leave(result.memory.state.memory)
                if cache is not None:
                    cache.memories[i] = result.memory.state
        if cache is not None:
            cache.tokens += hidden.shape[1]
            cache.padded |= placement.attention_mask is not None
            if commit_partial:
                cache.flush()
        hidden = self.norm(hidden)
        output = FwPKMModelOutput(
            last_hidden_state=hidden,
            **{CACHE: cache},
            hidden_states=(*passed[:-1], hidden) if output_hidden_states else None,
            attentions=(tuple(weights) or None) if output_attentions else None,
        )
        if output_memories and gates:
            output.gates, output.slots = tuple(gates), tuple(slots)
            output.addressing_loss = torch.stack(losses).mean()
            output.mean_gate = _mean(torch.stack(gates), placement.mask)
        return output


class FwPKMForCausalLM(FwPKMPreTrainedModel, FwPKMGenerationMixin):
    """:class:`FwPKMModel` and a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)
    accepts_loss_kwargs = True  # Trainer then says over how many labels a loss is averaged

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.model = FwPKMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def read(self, input_ids: Tensor, cache: FwPKMCache) -> None:
        """Read ``[B, T]`` tokens, of which there may be none, into ``cache``, in pieces."""
        for piece in input_ids.split(_PIECE, 1) if input_ids.shape[1] else ():
            self(piece, cache=cache, logits_to_keep=1)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: FwPKMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_memories: bool = False,
        commit_partial: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: FwPKMCache | None = None,
    ) -> FwPKMOutput:
        """Read a piece of ``B`` sequences, and predict the token after each of theirs.

        The arguments that are not listed are those of :meth:`FwPKMModel.forward`; ``return_dict=False`` gives a tuple.

        Args:
            labels: ``[B, T]``, usually ``input_ids`` (-100: left out). ``loss`` is the mean cross entropy of each next
                token; in training plus, with ``fwpkm_key_update="slow"``, the addressing loss, and
                ``fwpkm_gate_weight`` times the mean gate.
            logits_to_keep: logits of the last so many tokens only; 0 for all; or the columns to keep, 1-D.
            num_items_in_batch: over how many labels the loss is averaged, where a batch comes in several calls or on
                several devices; by default, those of this call. All terms of the loss are weighted by this call's
                share of them.

        Raises:
            ValueError: as :meth:`FwPKMModel.forward`, and for labels that do not match the tokens.
        """
        training = self.training and labels is not None
        read = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_memories=output_memories or training,
            commit_partial=commit_partial,
            return_dict=True,
        )
        hidden = read.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss: Tensor | None = None
        parts: dict[str, Tensor | None] = {}
        if labels is not None:
            require_shape("labels", labels, hidden.shape[:2])
            vocabulary = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocabulary, num_items_in_batch=num_items_in_batch)
        if training:
            assert labels is not None
            assert loss is not None
            parts = {"token_loss": loss, "addressing_loss": read.addressing_loss, "mean_gate": read.mean_gate}
            terms = self._further_terms(read)
            if terms is not None and num_items_in_batch is not None:
                terms = terms * ((labels[:, 1:] != -100).sum() / num_items_in_batch)
            loss = loss if terms is None else loss + terms
        return FwPKMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(read, CACHE)},
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            **parts,
            gates=read.gates if output_memories else None,
            slots=read.slots if output_memories else None,
        )

    def _further_terms(self, read: FwPKMModelOutput) -> Tensor | None:
        """What the loss of training has beside the cross entropy."""
        terms = []
        if read.addressing_loss is not None and self.config.fwpkm_key_update == "slow":
            terms.append(self.config.fwpkm_addressing_weight * read.addressing_loss)
        if read.mean_gate is not None and self.config.fwpkm_gate_weight:
            terms.append(self.config.fwpkm_gate_weight * read.mean_gate)
        return sum(terms[1:], terms[0]) if terms else None


class FwPKMForSequenceClassification(GenericForSequenceClassification, FwPKMPreTrainedModel):
    """:class:`FwPKMModel` and a head that says which class a text belongs to."""


class FwPKMForTokenClassification(GenericForTokenClassification, FwPKMPreTrainedModel):
    """:class:`FwPKMModel` and a head that says which class each token belongs to."""


class FwPKMForQuestionAnswering(GenericForQuestionAnswering, FwPKMPreTrainedModel):
    """:class:`FwPKMModel` and a head that says where in a text an answer begins and ends."""


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
