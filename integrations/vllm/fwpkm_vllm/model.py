"""The language model in vLLM: its attention, linear, embedding and norm layers, and fwpkm's memory layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import maybe_prefix

import fwpkm.models
from fwpkm.checks import require, require_dtype, require_finite, require_shape
from fwpkm.layers.block import product_key_memory
from fwpkm.layers.pkm import ProductKeyMemory
from fwpkm.models.configuration import FwPKMConfig
from fwpkm.models.modeling import memory_layer
from fwpkm_vllm import operator
from fwpkm_vllm.pages import MemoryPages
from fwpkm_vllm.step import serve
from fwpkm_vllm.touched import SlotsTouched

# The parts of vLLM's fused projections, as checkpoints have them.
FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class DecoderBlock(nn.Module):
    """:class:`fwpkm.layers.block.DecoderBlock` for the tokens of many requests."""

    def __init__(
        self, config: FwPKMConfig, index: int, touched: SlotsTouched, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.touched = touched
        self.memory = self.pages = None
        if index in (config.fwpkm_layers or ()):
            self.memory = memory_layer(config)
            self.pages = MemoryPages(config, vllm_config, f"{prefix}.pages")
            self.memory_name = f"{prefix}.memory"
            vllm_config.compilation_config.static_forward_context[self.memory_name] = self
        sliding = (config.layer_types or ())[index] == "sliding_attention"
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Qwen3Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            rope_parameters=config.rope_parameters,
            max_position=vllm_config.model_config.max_model_len,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=config.attention_bias,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.self_attn",
            per_layer_sliding_window=config.sliding_window if sliding else None,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if index in (config.pkm_layers or ()):
            self.mlp: nn.Module = product_key_memory(config)
        else:
            self.mlp = Qwen2MLP(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.mlp",
            )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        if self.memory is not None:
            hidden = operator.memory(hidden, self.memory_name)
        hidden = hidden + self.self_attn(positions, self.input_layernorm(hidden))
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, ProductKeyMemory):
            # A token that is no number stops nobody else's.
            return hidden + self.mlp(torch.nan_to_num(normed, 0.0).unsqueeze(0)).squeeze(0)
        return hidden + self.mlp(normed)

    def read_and_write(self, out: Tensor, hidden: Tensor) -> None:
        """The memory on ``hidden [T, D]`` of the current forward, written to ``out``."""
        assert self.memory is not None
        assert self.pages is not None
        step = self.pages.step(hidden.shape[0], hidden.device)
        tokens = step.batch.requests.shape[0]
        out[:tokens] = serve(self.memory, hidden[:tokens], step)
        out[tokens:] = hidden[tokens:]  # padding
        if self.pages.log.metadata is not None:
            self.touched.count(step.log, self.pages.log.metadata.doubled)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class FwPKMModel(nn.Module):
    """:class:`fwpkm.models.FwPKMModel` as vLLM runs models."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        touched = SlotsTouched(config.fwpkm_n_subkeys**2)
        self.layers = nn.ModuleList(
            DecoderBlock(config, i, touched, vllm_config, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states ``[T, D]`` of the step's tokens ``input_ids [T]``."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.layers:
            hidden = block(positions, hidden)
        return self.norm(hidden)


class FwPKMForCausalLM(nn.Module):
    """:class:`fwpkm.models.FwPKMForCausalLM` as vLLM runs models; it loads the same checkpoints."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = FwPKMModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states ``[T, D]`` of the step's tokens ``input_ids [T]``."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Of some tokens' hidden states."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of :class:`fwpkm.models.FwPKMForCausalLM`; every tensor of the model has to be in it."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in fwpkm.models.FwPKMForCausalLM(self.config).state_dict().items()}
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        read: set[str] = set()
        loaded = set()
        for tensor_name, tensor in weights:
            name, shard = tensor_name, list[Any]()
            *path, part, kind = ("", *name.split("."))
            if part in FUSED:
                fused, *shard = FUSED[part]
                name = ".".join((*path[1:], fused, kind))
            if tensor_name in tied:  # some tools write it; the embedding is what counts, as in transformers
                continue
            require(name in own, "the checkpoint", f"with {tensor_name}", "tensors of the model, and no others")
            require(tensor_name not in read, "the checkpoint", f"with {tensor_name} twice", "each tensor once")
            if tensor_name in shapes:
                require_shape(tensor_name, tensor, shapes[tensor_name])
            parameter = own[name]
            if parameter.is_floating_point():
                require_dtype(tensor_name, tensor, torch.float32, torch.bfloat16, torch.float16, torch.float64)
                require_finite(tensor_name, tensor.to(parameter.dtype))
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *shard)
            read.add(tensor_name)
            loaded.add(name)
        absent = sorted(shapes.keys() - read - tied)
        few = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        require(not absent, "the checkpoint", f"without {few}", "one with every tensor")
        return loaded
