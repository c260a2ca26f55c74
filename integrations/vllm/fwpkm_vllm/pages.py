"""Where vLLM keeps records: layers that are nothing but pages of its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
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
from vllm.v1.kv_cache_interface import AttentionSpec

from fwpkm.checks import require
from fwpkm.models import FwPKMConfig
from fwpkm_vllm.commit import origins
from fwpkm_vllm.folded import Folded
from fwpkm_vllm.keys import TOGETHER, MovingKeys, Part, parts
from fwpkm_vllm.options import log_limit, moves_keys
from fwpkm_vllm.paged import Pages, Versions
from fwpkm_vllm.records import (
    Layout,
    log_layout,
    query_layout,
    recent_layout,
    row_layout,
    stretch,
    tokens_beside_log,
    window,
)
from fwpkm_vllm.sharing import MANAGERS, CleaningSpec, FoldedSpec, KeysSpec, LogSpec, RecentSpec, StretchSpec
from fwpkm_vllm.step import Batch, Step

logger = init_logger("vllm.fwpkm")


@dataclass(frozen=True)
class PagesMetadata:
    """What vLLM says of a step to layers that share their block tables."""

    batch: Batch
    table: Tensor  # [R, B]
    places: Tensor  # [T]
    due: Sequence[tuple[int, int]]  # requests that complete a stretch in this step, and which, where logs are folded
    parts: Sequence[Part]  # of the step's tokens, where keys move
    doubled: Sequence[tuple[int, int]]  # requests that have twice the chunks of before, and their tokens, of a log


class PagesMetadataBuilder(AttentionMetadataBuilder[PagesMetadata]):
    """Makes :class:`PagesMetadata` of what vLLM tells every attention backend."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.spec = kv_cache_spec
        self.chunk_size = vllm_config.model_config.hf_config.fwpkm_chunk_size

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
            origins(self.vllm_config, requests, common.seq_lens.device),
        )
        places = common.slot_mapping[:tokens].clamp_min(0)  # vLLM's -1, of padding, to the block of nobody
        due, together, doubled = [], [], []
        if isinstance(self.spec, FoldedSpec):
            due = completed(common, self.spec.attention_chunk_size)
        elif isinstance(self.spec, KeysSpec):
            together = parts(pieces(common), self.spec.attention_chunk_size, common.seq_lens.device)
        elif isinstance(self.spec, LogSpec):
            doubled = doubling(common, self.chunk_size)
        return PagesMetadata(batch, common.block_table_tensor[:requests], places, due, together, doubled)


def pieces(common: CommonAttentionMetadata) -> list[tuple[int, int, int]]:
    """Of each request its first token in the step, and from where to where it goes; what the host knows."""
    lengths = common.seq_lens_cpu_upper_bound  # exact, as there is no speculative decoding
    starts = common.query_start_loc_cpu.tolist()
    ends = (common.seq_lens if lengths is None else lengths).tolist()[: common.num_reqs]
    counts = common.query_start_loc_cpu.diff().tolist()
    return [(first, end - count, end) for first, count, end in zip(starts, counts, ends, strict=False)]


def completed(common: CommonAttentionMetadata, stretch: int) -> list[tuple[int, int]]:
    """Requests that complete a stretch in this step, and which."""
    stretches = [(computed // stretch, end // stretch) for _, computed, end in pieces(common)]
    assert all(last <= first + 1 for first, last in stretches), "a step is no longer than a stretch"
    return [(i, last) for i, (first, last) in enumerate(stretches) if first < last]


def doubling(common: CommonAttentionMetadata, chunk_size: int) -> list[tuple[int, int]]:
    """Requests that complete chunk 1, 2, 4, ... in this step, and the tokens up to it."""
    chunks = [(computed // chunk_size, end // chunk_size) for _, computed, end in pieces(common)]
    grown = [(i, last) for i, (first, last) in enumerate(chunks) if last.bit_length() > first.bit_length()]
    return [(i, chunk_size << last.bit_length() - 1) for i, last in grown]


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
        config: of the model.
        layout: of a record.
        vllm_config: vLLM's, which learns of this layer.
        prefix: the layer's name.
    """

    def __init__(self, config: FwPKMConfig, layout: Layout, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config, self.layout, self.prefix = config, layout, prefix
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache: Any = ()
        self.page_bytes = self.records = 0  # of a page; known when there are pages

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PagesBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        spec = self.spec(vllm_config)
        assert type(spec) in MANAGERS, (
            f"{type(spec)} is none of the kinds whose pages are offered once they are written"
        )
        return spec

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        """What vLLM is to know of these pages: one of the kinds of :mod:`fwpkm_vllm.sharing`."""
        raise NotImplementedError

    def kind(self, vllm_config: VllmConfig) -> dict[str, Any]:
        """Of pages of the size that attention has, with as many records as fit."""
        page_bytes, size = attention_page_bytes(vllm_config), vllm_config.cache_config.block_size
        tokens = tokens_beside_log(page_bytes, self.layout.nbytes, size, self.config)
        self.page_bytes = max(page_bytes, tokens * self.layout.nbytes)
        return self.bytes_of(tokens, self.layout.nbytes)

    def whole_pages(self, vllm_config: VllmConfig) -> dict[str, Any]:
        """Of pages of that size which do not belong to tokens; vLLM has blocks of tokens only."""
        self.page_bytes, tokens = attention_page_bytes(vllm_config), vllm_config.cache_config.block_size
        return self.bytes_of(tokens, self.page_bytes // tokens)

    def bytes_of(self, tokens: int, nbytes: int) -> dict[str, Any]:
        """What vLLM is to know of pages for so many tokens."""
        return {
            "block_size": tokens,
            "num_kv_heads": 1,
            "head_size": nbytes,
            "head_size_v": 0,
            "dtype": torch.uint8,
            "page_size_padded": self.page_bytes,
        }

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the cache, bytes ``[blocks, 1, page, nbytes]``.

        It is kept as whole pages ``[blocks, bytes]``, padding included. The same blocks hold keys and values of
        attention at other times, which must not find anything there that is no number; and so vLLM fills the pages of
        new blocks with zeros, as far as layers show them to it.
        """
        blocks, _, tokens, nbytes = kv_cache.shape
        require(kv_cache.stride()[2:] == (nbytes, 1), "kv_cache.stride()", kv_cache.stride(), "records side by side")
        self.records = tokens * nbytes // self.layout.nbytes
        self.kv_cache = kv_cache.as_strided((blocks, self.page_bytes), (kv_cache.stride(0), 1))

    @property
    def fields(self) -> dict[str, Tensor]:
        """``[blocks, page, width]`` of each field, views of the cache."""
        records = self.kv_cache[:, : self.records * self.layout.nbytes]
        return self.layout.views(records.unflatten(1, (self.records, self.layout.nbytes)))

    @property
    def metadata(self) -> PagesMetadata | None:
        """Of the current forward; None while vLLM measures how much memory a step takes."""
        everything: Any = get_forward_context().attn_metadata
        return None if everything is None else everything[self.prefix]

    def current(self) -> Pages:
        """These pages in the current forward, of which there is metadata."""
        assert self.metadata is not None
        return Pages(self.fields, self.metadata.table, self.metadata.places)


class RecentPages(RecordPages):
    """Records of the last tokens."""

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        return RecentSpec(sliding_window=window(self.config), **self.kind(vllm_config))


class LogPages(RecordPages):
    """The write log: of all tokens, or of those since the last whole stretch if there is a limit."""

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        kind, config = self.kind(vllm_config), self.config
        length, (n, width) = stretch_length(config, vllm_config), (config.fwpkm_n_subkeys, config.fwpkm_value_dim)
        bytes_a_token = self.page_bytes / kind["block_size"]
        logger.info_once(
            "Write logs: %.0f bytes a token and memory layer, %.2f MB for a request of 4096 tokens; dense fast "
            "weights would take %.2f MB, which all requests share, read-only.",
            bytes_a_token,
            4096 * bytes_a_token / 1e6,
            4 * n * (n * width + config.fwpkm_heads * config.fwpkm_key_dim) / 1e6,
        )
        if length is None:
            return LogSpec(**kind)
        logger.info_once(
            "A request's records are added up after each %d tokens: beyond that it has %.2f MB of rows of its own a "
            "memory layer, and at most %.2f MB of records.",
            length,
            4 * n * n * width / 1e6,
            (length + vllm_config.max_in_flight_tokens) * bytes_a_token / 1e6,
        )
        return StretchSpec(attention_chunk_size=length, **kind)


class VersionPages(RecordPages):
    """Dense rows that a request has of its own, in versions.

    Args:
        count: rows of a version.
        config, layout, vllm_config, prefix: as of :class:`RecordPages`; the layout is that of a row.
    """

    def __init__(self, count: int, config: FwPKMConfig, layout: Layout, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, layout, vllm_config, prefix)
        self.count = count
        self.pages = 0  # of a version; known when there are pages

    def of_versions(self, vllm_config: VllmConfig) -> dict[str, Any]:
        """What vLLM is to know of the pages, of which a version takes :attr:`pages`."""
        kind = self.whole_pages(vllm_config)
        rows = self.page_bytes // self.layout.nbytes
        expected = f"more: {self.layout.nbytes} bytes of a row have to fit into a page"
        require(rows > 0, "block_size", vllm_config.cache_config.block_size, expected)
        self.pages = -(-self.count // rows)
        return {"pages": self.pages, **kind}

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.records = self.page_bytes // self.layout.nbytes

    def versions(self) -> Versions:
        """The rows in the current forward, of which there is metadata."""
        assert self.metadata is not None
        return Versions(self.fields["rows"], self.metadata.table, self.pages)


class FoldedPages(VersionPages):
    """What the records of a request's whole stretches add up to, a row a slot."""

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        length = stretch_length(self.config, vllm_config)
        assert length is not None
        self.stretch = length
        return FoldedSpec(attention_chunk_size=length, **self.of_versions(vllm_config))

    def current_rows(self) -> Folded:
        """The rows in the current forward."""
        assert self.metadata is not None
        return Folded(self.versions(), self.stretch, self.metadata.due)


class KeyPages(VersionPages):
    """What the commits of a request's chunks have made of the sub-keys, a row each."""

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        kind, chunk = self.of_versions(vllm_config), self.config.fwpkm_chunk_size
        taken, used = self.pages * self.page_bytes, self.count * self.layout.nbytes
        logger.info_once(
            "Keys that move: a request of %d tokens or more has %.3f MB of them a memory layer, in %d pages (%.3f MB "
            "of it padding), and once more for each such chunk that a step completes.",
            chunk,
            taken / 1e6,
            self.pages,
            (taken - used) / 1e6,
        )
        return KeysSpec(attention_chunk_size=chunk, **kind)


class QueryPages(RecordPages):
    """The queries of the open chunk, which its key commit needs."""

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        kind, chunk = self.kind(vllm_config), self.config.fwpkm_chunk_size
        bytes_a_token = self.page_bytes / kind["block_size"]
        logger.info_once(
            "Queries of open chunks: %.0f bytes a token and memory layer, at most %.3f MB a request.",
            bytes_a_token,
            -(-chunk // kind["block_size"]) * self.page_bytes / 1e6,
        )
        return StretchSpec(attention_chunk_size=chunk, **kind)


class CleaningPages(RecordPages):
    """No pages of its own: what shows vLLM those of the other layers, to be filled with zeros on a CPU."""

    def spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        return CleaningSpec(**self.whole_pages(vllm_config))


class MemoryPages(nn.Module):
    """The pages of a memory layer: its write log, what it was folded to, what the next few tokens need, and keys."""

    def __init__(self, config: FwPKMConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.log = LogPages(config, log_layout(config), vllm_config, f"{prefix}.log")
        dtype, rows = vllm_config.model_config.dtype, row_layout(config.fwpkm_value_dim)
        self.recent = RecentPages(config, recent_layout(config, dtype), vllm_config, f"{prefix}.recent")
        self.folded = self.keys = None
        if log_limit(vllm_config) is not None:
            self.folded = FoldedPages(config.fwpkm_n_subkeys**2, config, rows, vllm_config, f"{prefix}.folded")
            if vllm_config.device_config.device_type == "cpu":
                self.cleaning = CleaningPages(config, rows, vllm_config, f"{prefix}.cleaning")
        if moves_keys(config):
            count, halves = config.fwpkm_heads * 2 * config.fwpkm_n_subkeys, row_layout(config.fwpkm_key_dim // 2)
            self.keys = KeyPages(count, config, halves, vllm_config, f"{prefix}.keys")
            self.queries = QueryPages(config, query_layout(config, dtype), vllm_config, f"{prefix}.queries")

    def step(self, tokens: int, device: torch.device) -> Step:
        """The step of the current forward.

        While vLLM measures how much memory a step takes it is one request with a page for nobody.
        """
        metadata = self.log.metadata
        if metadata is not None:
            folded = None if self.folded is None else self.folded.current_rows()
            return Step(metadata.batch, self.log.current(), self.recent.current(), folded, self.current_keys())
        ends = torch.tensor([0, tokens], device=device)
        places = torch.zeros(tokens, dtype=torch.int64, device=device)

        def for_nobody(layout: Layout) -> Pages:
            nothing = torch.zeros(1, 1, layout.nbytes, dtype=torch.uint8, device=device)
            return Pages(layout.views(nothing), places.unsqueeze(0), places)

        if self.folded is not None:  # what a step takes that folds a log
            torch.empty(self.folded.count, self.config.fwpkm_value_dim, device=device)
        if self.keys is not None:  # what a step takes that moves keys: those that there were, and new ones
            torch.empty(2, TOGETHER, self.keys.count, self.config.fwpkm_key_dim // 2, device=device)
        batch = Batch.of(ends, ends[1:], tokens, tokens)
        return Step(batch, for_nobody(self.log.layout), for_nobody(self.recent.layout))

    def current_keys(self) -> MovingKeys | None:
        """The requests' keys in the current forward, if they have any."""
        if self.keys is None:
            return None
        assert self.keys.metadata is not None
        return MovingKeys(self.keys.versions(), self.queries.current(), self.keys.metadata.parts)


def stretch_length(config: FwPKMConfig, vllm_config: VllmConfig) -> int | None:
    """After how many tokens a request's records are added up; None for never."""
    limit = log_limit(vllm_config)
    if limit is None:
        return None
    page_bytes, size = attention_page_bytes(vllm_config), vllm_config.cache_config.block_size
    layouts = log_layout(config), recent_layout(config, vllm_config.model_config.dtype)
    blocks = [tokens_beside_log(page_bytes, layout.nbytes, size, config) for layout in layouts]
    least = vllm_config.scheduler_config.max_num_batched_tokens
    return stretch(max(limit, least), config.fwpkm_chunk_size, size, *blocks)


def attention_page_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a page of the model's attention layers."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer, Attention)]
    return max(spec.page_size_bytes for spec in specs if spec is not None)
