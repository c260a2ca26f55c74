"""Where vLLM keeps records: layers that are nothing but pages of its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from fwpkm.checks import require
from fwpkm_vllm.commit import origins
from fwpkm_vllm.records import Layout, tokens_per_page
from fwpkm_vllm.sharing import LogSpec
from fwpkm_vllm.step import Batch, Pages

logger = init_logger("vllm.fwpkm")


@dataclass(frozen=True)
class PagesMetadata:
    """What vLLM says of a step to layers that share their block tables."""

    batch: Batch
    table: Tensor  # [R, B]
    places: Tensor  # [T]


class PagesMetadataBuilder(AttentionMetadataBuilder[PagesMetadata]):
    """Makes :class:`PagesMetadata` of what vLLM tells every attention backend."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagesMetadata:
        common = common_attn_metadata
        tokens, requests = common.num_actual_tokens, common.num_reqs
        batch = Batch.of(
            common.query_start_loc[: requests + 1],
            common.seq_lens[:requests],
            tokens,
            common.max_query_len,
            origins(requests, common.seq_lens.device),
        )
        places = common.slot_mapping[:tokens].clamp_min(0)  # vLLM's -1, of padding, to the block of nobody
        return PagesMetadata(batch, common.block_table_tensor[:requests], places)


class PagesBackend(AttentionBackend):
    """What makes vLLM give a layer pages and block tables; there is no attention."""

    @staticmethod
    def get_name() -> str:
        return "FWPKM_PAGES"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("records are read by the memory layer itself")

    @staticmethod
    def get_builder_cls() -> type[PagesMetadataBuilder]:
        return PagesMetadataBuilder


class RecordPages(nn.Module, AttentionLayerBase):
    """Pages of records of one kind, of one memory layer; vLLM allocates, shares, caches and frees them.

    Args:
        layout: of a record.
        window: how many of its last tokens a request keeps; None for all.
        vllm_config: vLLM's, which learns of this layer.
        prefix: the layer's name.
        replaces: bytes of the dense fast weights that a request has these records instead of.
    """

    def __init__(
        self, layout: Layout, window: int | None, vllm_config: VllmConfig, prefix: str, replaces: int = 0
    ) -> None:
        super().__init__()
        self.layout, self.window, self.prefix, self.replaces = layout, window, prefix, replaces
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache: Any = ()
        self.page_bytes = self.tokens = 0  # known when there are pages

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PagesBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        """Pages of the size that attention has, with as many records as fit."""
        block_size = vllm_config.cache_config.block_size
        page_bytes = attention_page_bytes(vllm_config)
        tokens = tokens_per_page(page_bytes, self.layout.nbytes, block_size)
        self.page_bytes = max(page_bytes, tokens * self.layout.nbytes)
        kind: dict[str, Any] = {
            "block_size": tokens,
            "num_kv_heads": 1,
            "head_size": self.layout.nbytes,
            "head_size_v": 0,
            "dtype": torch.uint8,
            "page_size_padded": self.page_bytes,
        }
        if self.window is not None:
            return SlidingWindowSpec(sliding_window=self.window, **kind)
        spec = LogSpec(**kind)
        if self.replaces:
            bytes_a_token = spec.page_size_bytes / tokens
            logger.info_once(
                "Write logs: %.0f bytes a token and memory layer, %.2f MB for a request of 4096 tokens; dense fast "
                "weights would take %.2f MB, which all requests share, read-only.",
                bytes_a_token,
                4096 * bytes_a_token / 1e6,
                self.replaces / 1e6,
            )
        return spec

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the cache, bytes ``[blocks, 1, page, nbytes]``.

        It is kept as whole pages ``[blocks, bytes]``, padding included. The same blocks hold keys and values of
        attention at other times, which must not find anything there that is no number; and so vLLM fills the pages of
        new blocks with zeros, as far as layers show them to it.
        """
        blocks, _, tokens, nbytes = kv_cache.shape
        require(kv_cache.stride()[2:] == (nbytes, 1), "kv_cache.stride()", kv_cache.stride(), "records side by side")
        self.tokens = tokens
        self.kv_cache = kv_cache.as_strided((blocks, self.page_bytes), (kv_cache.stride(0), 1))

    @property
    def fields(self) -> dict[str, Tensor]:
        """``[blocks, page, width]`` of each field, views of the cache."""
        records = self.kv_cache[:, : self.tokens * self.layout.nbytes]
        return self.layout.views(records.unflatten(1, (self.tokens, self.layout.nbytes)))

    def current(self, tokens: int, device: torch.device) -> tuple[Batch, Pages]:
        """The step of the current forward, and this layer's pages in it.

        While vLLM measures how much memory a step takes there are none: then one request with a page for nobody.
        """
        everything: Any = get_forward_context().attn_metadata
        if everything is not None:
            metadata: PagesMetadata = everything[self.prefix]
            return metadata.batch, Pages(self.fields, metadata.table, metadata.places)
        nothing = torch.zeros(1, 1, self.layout.nbytes, dtype=torch.uint8, device=device)
        places = torch.zeros(tokens, dtype=torch.int64, device=device)
        ends = torch.tensor([0, tokens], device=device)
        batch = Batch.of(ends, ends[1:], tokens, tokens)
        return batch, Pages(self.layout.views(nothing), places.unsqueeze(0), places)


def attention_page_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a page of the model's attention layers."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer, Attention)]
    return max(spec.page_size_bytes for spec in specs if spec is not None)
