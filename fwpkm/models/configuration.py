"""Configuration of the hybrid language model."""

from __future__ import annotations

import dataclasses
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from fwpkm.checks import require, require_choice
from fwpkm.layers.mixers import WINDOWED
from fwpkm.memory import MemoryConfig

LAYER_TYPES = ("full_attention", "sliding_attention")


@strict
class FwPKMConfig(PreTrainedConfig):
    """Configuration of :class:`fwpkm.models.FwPKMForCausalLM`: Qwen3's fields, then those of the memory layers.

    Args:
        vocab_size: tokens; 256 suits bytes.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        hidden_act, max_position_embeddings, initializer_range, rms_norm_eps, tie_word_embeddings, rope_parameters,
        attention_bias, attention_dropout, use_cache: as in ``transformers.Qwen3Config``.
        layer_types: ``"full_attention"`` or ``"sliding_attention"`` for each block; all full by default.
        sliding_window: tokens that a sliding-window block sees, the current one included.
        fwpkm_layers: blocks with a memory before their attention.
        fwpkm_n_subkeys, fwpkm_key_dim, fwpkm_value_dim, fwpkm_heads, fwpkm_query_conv: as in
        :class:`fwpkm.layers.FwPKM`. fwpkm_topk ... fwpkm_log_dtype: as in :class:`fwpkm.MemoryConfig`.
        fwpkm_gate_weight: weight of the mean gate in the loss, what an open gate costs; 0 for none, as in the paper.
    """

    model_type = "fwpkm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 256
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 1 << 20
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    fwpkm_layers: list[int] | None = None
    fwpkm_n_subkeys: int = 512
    fwpkm_key_dim: int = 512
    fwpkm_value_dim: int = 512
    fwpkm_heads: int = 1
    fwpkm_query_conv: int = 0
    fwpkm_topk: int = 8
    fwpkm_chunk_size: int = 512
    fwpkm_lookahead: int = 1
    fwpkm_learning_rate: float | int = 1.0
    fwpkm_write_scale: str = "reference"
    fwpkm_score: str = "idw"
    fwpkm_score_eps: float | int = 1e-3
    fwpkm_temperature: float | int = 1.0
    fwpkm_nonlinearity: str = "softmax"
    fwpkm_addressing_weight: float | int = 1.0
    fwpkm_key_update: str = "fast"
    fwpkm_scope: str = "sequence"
    fwpkm_detach_every: int | None = None
    fwpkm_log_dtype: str = "float32"
    fwpkm_gate_weight: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.fwpkm_layers is None:
            self.fwpkm_layers = []
        blocks = self.num_hidden_layers
        require(len(self.layer_types) == blocks, "layer_types", self.layer_types, "one for each of {} blocks", blocks)
        for kind in self.layer_types:
            require_choice("layer_types", kind, LAYER_TYPES)
        sliding = "sliding_attention" in self.layer_types
        require(not sliding or bool(self.sliding_window), "sliding_window", self.sliding_window, "a number of tokens")
        for layer in self.fwpkm_layers:
            require(0 <= layer < blocks, "fwpkm_layers", layer, "a block in [0, {})", blocks)
        self.memory_config()  # refuses what a memory cannot do
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = WINDOWED
        super().__post_init__(**kwargs)

    def memory_config(self) -> MemoryConfig:
        """The :class:`fwpkm.MemoryConfig` of the memory layers."""
        return MemoryConfig(**{f.name: getattr(self, f"fwpkm_{f.name}") for f in dataclasses.fields(MemoryConfig)})
