"""Configuration of the hybrid language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from fwpkm.checks import require, require_choice, require_integer, require_number
from fwpkm.data.byte_tokenizer import END, VOCABULARY
from fwpkm.layers.mixers import FLASH_LINEAR
from fwpkm.memory import MemoryConfig
from fwpkm.models.checkpoint_files import AUTO_MAP, write_beside

LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "fwpkm_n_subkeys",
    "fwpkm_key_dim",
    "fwpkm_value_dim",
    "fwpkm_heads",
    "pkm_n_subkeys",
    "pkm_key_dim",
    "pkm_value_dim",
    "pkm_heads",
    "pkm_topk",
)
NUMBERS = ("initializer_range", "attention_dropout", "fwpkm_gate_weight")
FLAGS = ("use_cache", "tie_word_embeddings", "attention_bias", "fwpkm_learn_initial_values")


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
        require_integer("num_hidden_layers", self.num_hidden_layers, 1)
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.eos_token_id is None and self.vocab_size == VOCABULARY:
            self.eos_token_id = END
        self.fwpkm_layers = self.fwpkm_layers or []
        self.pkm_layers = self.pkm_layers or []
        self.check(*kwargs)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def check(self, *others: str) -> None:
        """Refuse what describes no model, also after fields have been changed.

        Args:
            others: names of what was given beside the fields; those of this model's kind are misspelled.

        Raises:
            ValueError: naming the field, its value and what is expected.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        for name in {*vars(self), *others} - fields:
            require(not name.startswith(("fwpkm_", "pkm_")), "a field", repr(name), "fields of FwPKMConfig")
        for name in POSITIVE:
            require_integer(name, getattr(self, name), 1)
        require_integer("fwpkm_query_conv", self.fwpkm_query_conv, 0)
        for name in NUMBERS:
            require_number(name, getattr(self, name), 0)
        require(self.attention_dropout <= 1, "attention_dropout", self.attention_dropout, "a share, at most 1")
        require_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        require_number("rms_norm_eps", self.rms_norm_eps, 0, open=True)
        for name in FLAGS:
            require(isinstance(getattr(self, name), bool), name, repr(getattr(self, name)), "true or false")
        self._check_layers()
        sliding = "sliding_attention" in (self.layer_types or ())
        some = self.sliding_window is not None
        require(some or not sliding, "sliding_window", self.sliding_window, "a number of tokens")
        if some:
            require_integer("sliding_window", self.sliding_window, 1)
        for name, value in (self.rope_parameters or {}).items():
            if name == "rope_theta" or isinstance(value, float):
                require_number(f"rope_parameters[{name!r}]", value, 0)
        for large, small in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            have, divisor = getattr(self, large), getattr(self, small)
            require(have % divisor == 0, large, have, "a multiple of {} ({})", small, divisor)
        for name in ("fwpkm_key_dim", "pkm_key_dim"):
            width = getattr(self, name)
            require(width % 2 == 0, name, width, "a positive even number, one half a codebook")
        enough = self.pkm_topk <= self.pkm_n_subkeys
        require(enough, "pkm_topk", self.pkm_topk, "at most pkm_n_subkeys ({})", self.pkm_n_subkeys)
        self.memory_config()  # refuses what a memory cannot do

    def _check_layers(self) -> None:
        """Of each field that says something of blocks or layers."""
        blocks = self.num_hidden_layers
        for name in ("layer_types", "fwpkm_layers", "pkm_layers"):
            require(isinstance(getattr(self, name), list | tuple), name, repr(getattr(self, name)), "a list")
        kinds = self.layer_types or []
        require(len(kinds) == blocks, "layer_types", kinds, "one for each of {} blocks", blocks)
        named = [str(kind).removeprefix(FLASH_LINEAR) for kind in kinds if str(kind).startswith(FLASH_LINEAR)]
        for kind in kinds:
            if not str(kind).startswith(FLASH_LINEAR):
                require_choice("layer_types", kind, (*LAYER_TYPES, f"{FLASH_LINEAR}<layer>"))
        for name in named:
            require(
                name.isidentifier(), "layer_types", repr(FLASH_LINEAR + name), "a layer's name after {!r}", FLASH_LINEAR
            )
        options = self.fla_options or {}
        require(isinstance(options, dict), "fla_options", repr(options), "an object with the layers' names")
        for name in options:
            require(name in named, "fla_options", name, "a layer that layer_types names: {}", named or "none")
        for name in ("fwpkm_layers", "pkm_layers"):
            layers = getattr(self, name)
            for layer in layers:
                whole = isinstance(layer, int) and not isinstance(layer, bool)
                require(whole and 0 <= layer < blocks, name, repr(layer), "a block in [0, {})", blocks)
            require(len(set(layers)) == len(layers), name, layers, "each block once")

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
        fields = {field.name: getattr(self, f"fwpkm_{field.name}") for field in dataclasses.fields(MemoryConfig)}
        try:
            return MemoryConfig(**fields)
        except ValueError as error:  # which begins with the name that the field has there
            raise ValueError(f"fwpkm_{error}") from None
