"""Configuration of the hybrid language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from fwpkm.checks import require, require_choice
from fwpkm.data.byte_tokenizer import END, VOCABULARY
from fwpkm.layers.mixers import FLASH_LINEAR
from fwpkm.memory import MemoryConfig
from fwpkm.models.checkpoint_files import AUTO_MAP, write_beside

LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
POSITIVE = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "pkm_n_subkeys",
    "pkm_value_dim",
    "pkm_heads",
    "pkm_topk",
)


@strict
class FwPKMConfig(PreTrainedConfig):
    """Configuration of :class:`fwpkm.models.FwPKMForCausalLM`: Qwen3's fields, then those of the memory layers.

    Fields that are not listed are those of ``transformers.Qwen3Config``, and ``linear_...``, of linear attention, those
    of ``transformers.Qwen3NextConfig``.

    Args:
        vocab_size: tokens; 256 are bytes.
        eos_token_id: what ends a text; for bytes 255 unless given, which no UTF-8 has.
        layer_types: ``"full_attention"``, ``"sliding_attention"``, ``"linear_attention"`` (a gated delta net) or
            ``"fla:<layer>"``, a layer of flash-linear-attention, for each block; all full by default.
        sliding_window: tokens that a sliding-window block sees, the current one included.
        fla_options: further arguments of flash-linear-attention's layers, by the layer's name.
        fwpkm_layers: blocks with a memory before their attention.
        fwpkm_n_subkeys, fwpkm_key_dim, fwpkm_value_dim: as in :class:`fwpkm.layers.FwPKM`.
        fwpkm_heads, fwpkm_query_conv, fwpkm_learn_initial_values: as in :class:`fwpkm.layers.FwPKM`.
        fwpkm_topk ... fwpkm_log_dtype: as in :class:`fwpkm.MemoryConfig`.
        fwpkm_gate_weight: weight of the mean gate in the loss, what an open gate costs; 0 for none, as in the paper.
        pkm_layers: blocks with a product-key memory in the place of their MLP.
        pkm_n_subkeys, pkm_key_dim, pkm_value_dim, pkm_heads, pkm_topk: as in :class:`fwpkm.layers.ProductKeyMemory`.
    """

    model_type = "fwpkm"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "gates", "slots"]  # noqa: RUF012 (transformers' own form)

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
    linear_num_key_heads: int = 6
    linear_num_value_heads: int = 12
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    fla_options: dict[str, dict[str, Any]] | None = None
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
    fwpkm_learn_initial_values: bool = False
    fwpkm_gate_weight: float | int = 0.0

    pkm_layers: list[int] | None = None
    pkm_n_subkeys: int = 512
    pkm_key_dim: int = 512
    pkm_value_dim: int = 512
    pkm_heads: int = 4
    pkm_topk: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.eos_token_id is None and self.vocab_size == VOCABULARY:
            self.eos_token_id = END
        self.fwpkm_layers = self.fwpkm_layers or []
        self.pkm_layers = self.pkm_layers or []
        blocks = self.num_hidden_layers
        require(len(self.layer_types) == blocks, "layer_types", self.layer_types, "one for each of {} blocks", blocks)
        named = [kind.removeprefix(FLASH_LINEAR) for kind in self.layer_types if kind.startswith(FLASH_LINEAR)]
        for kind in self.layer_types:
            if not kind.startswith(FLASH_LINEAR):
                require_choice("layer_types", kind, (*LAYER_TYPES, f"{FLASH_LINEAR}<layer>"))
        for name in named:
            require(
                name.isidentifier(), "layer_types", repr(FLASH_LINEAR + name), "a layer's name after {!r}", FLASH_LINEAR
            )
        for name in self.fla_options or {}:
            require(name in named, "fla_options", name, "a layer that layer_types names: {}", named or "none")
        sliding = "sliding_attention" in self.layer_types
        require(not sliding or bool(self.sliding_window), "sliding_window", self.sliding_window, "a number of tokens")
        for name in ("fwpkm_layers", "pkm_layers"):
            for layer in getattr(self, name):
                require(0 <= layer < blocks, name, layer, "a block in [0, {})", blocks)
        for name in POSITIVE:
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        key_heads, value_heads = self.linear_num_key_heads, self.linear_num_value_heads
        whole = value_heads % key_heads == 0
        require(whole, "linear_num_value_heads", value_heads, "a multiple of linear_num_key_heads ({})", key_heads)
        even = self.pkm_key_dim >= 2 and self.pkm_key_dim % 2 == 0
        require(even, "pkm_key_dim", self.pkm_key_dim, "a positive even number, one half a codebook")
        enough = self.pkm_topk <= self.pkm_n_subkeys
        require(enough, "pkm_topk", self.pkm_topk, "at most pkm_n_subkeys ({})", self.pkm_n_subkeys)
        self.memory_config()  # refuses what a memory cannot do
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """transformers' own, as every model's is; a tokenizer of bytes and the way to this package come with it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_beside(Path(save_directory), self.vocab_size)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a checkpoint names this package and holds no copy of its code."""

    def validate_layer_type(self) -> None:
        """Nothing that is not checked already: transformers' own knows none but its own layer types."""

    def memory_config(self) -> MemoryConfig:
        """The :class:`fwpkm.MemoryConfig` of the memory layers."""
        return MemoryConfig(**{f.name: getattr(self, f"fwpkm_{f.name}") for f in dataclasses.fields(MemoryConfig)})
