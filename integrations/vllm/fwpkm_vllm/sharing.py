"""When pages of memories may be shared, once they have been written, and for how long they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


class Later(SingleTypeKVCacheManager):
    """Offers a request's blocks to others when the step that writes them is over, and not before: the rule for pages of
    memories of every kind.

    vLLM offers blocks when a step is scheduled, to requests of the same step too: attention writes all keys and values
    of a step before it reads any. A memory reads what the chunk before has left, so the requests of a step must not
    need what another of them writes. What is to be offered is therefore kept until the next step is scheduled, before
    any block of it is given or freed, or until the request gives its blocks back: at its end, or since it is preempted,
    and then perhaps in the step in which they were given, which is not counted as computed.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.scheduled: dict[str, tuple[Any, int, int | None, Sequence[int]]] = {}

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        self.scheduled[request.request_id] = request, num_tokens, retention_interval, replay_boundaries

    def new_step_starts(self) -> None:
        super().new_step_starts()
        for request_id in list(self.scheduled):
            self._offer_what_is_written(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._offer_what_is_written(request_id)
        return super().pop_blocks_for_free(request_id)

    def _offer_what_is_written(self, request_id: str) -> None:
        if request_id in self.scheduled:
            request, tokens, retention_interval, boundaries = self.scheduled.pop(request_id)
            self.offer(request, min(tokens, request.num_computed_tokens), retention_interval, boundaries)

    def offer(
        self, request: Any, tokens: int, retention_interval: int | None, replay_boundaries: Sequence[int]
    ) -> None:
        """Let others find the blocks of a request's first ``tokens``, which are written."""
        super().cache_blocks(request, tokens, retention_interval, replay_boundaries=replay_boundaries)


class LogSpec(FullAttentionSpec):
    """Records of all of a request's tokens."""


class LogManager(Later, FullAttentionManager):
    """Keeps all of them."""


class RecentSpec(SlidingWindowSpec):
    """Records of the last ``sliding_window`` tokens, the one that reads them included."""

    def first_needed(self, computed: int) -> int:
        """The first of the tokens whose records are needed when so many are computed."""
        return max(0, computed - self.sliding_window + 1)


class StretchSpec(ChunkedLocalAttentionSpec):
    """Records of the tokens since the last multiple of ``attention_chunk_size``, the length of a stretch."""

    def first_needed(self, computed: int) -> int:
        """The first of the tokens whose records are needed when so many are computed."""
        return computed // self.attention_chunk_size * self.attention_chunk_size

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Those of a stretch and of the steps under way; stretches may begin inside a block."""
        tokens = self.attention_chunk_size + max_in_flight_tokens
        return min(1 + -(-tokens // self.block_size), -(-max_model_len // self.block_size))


class LastManager(Later):
    """Frees the blocks before the first that is needed, and finds prefixes by those from it on."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.kv_cache_spec.first_needed(num_computed_tokens)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The most tokens of which all blocks are there that the next token needs, be it none.

        vLLM's own finders take a window of one token, which needs nothing, for one that is never there, and know no
        stretches of other lengths than whole blocks.
        """
        size = kv_cache_spec.block_size
        scale = size // block_pool.hash_block_size
        length = max_length // alignment_tokens * alignment_tokens
        while True:
            first = kv_cache_spec.first_needed(length) // size
            found: list[list[Any]] = []
            for block in range(first, length // size):
                cached = block_pool.get_cached_block(block_hashes[(block + 1) * scale - 1], kv_cache_group_ids)
                if cached is None:
                    length = block * size // alignment_tokens * alignment_tokens
                    break
                found.append(cached)
            else:
                nothing = [block_pool.null_block] * first
                return tuple(nothing + [blocks[i] for blocks in found] for i in range(len(kv_cache_group_ids))), length


class RecentManager(LastManager, SlidingWindowManager):
    """Of a window's blocks, those are offered that vLLM's retention of windows keeps."""


@dataclass(frozen=True, kw_only=True)
class VersionsSpec(ChunkedLocalAttentionSpec):
    """Dense rows that are a function of all whole stretches, in ``pages`` blocks.

    The rows at the end of a stretch are a function of the tokens before, have blocks of their own and are never
    rewritten, as records are. A request's row of the block table has one version of them after the other.
    """

    pages: int

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The version that is read, and those made in the steps under way."""
        stretch = self.attention_chunk_size
        return self.pages * min(1 + -(-max_in_flight_tokens // stretch), max_model_len // stretch)

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """All versions that a request may come to; vLLM looks where tokens would stand, too."""
        return max(self.pages * (max_len // self.attention_chunk_size), -(-max_len // self.block_size))


class FoldedSpec(VersionsSpec):
    """What the records of whole stretches add up to; a step completes one stretch at most."""


class KeysSpec(VersionsSpec):
    """What commits have made of the sub-keys; stretches are chunks, of which a step may complete many."""


class VersionsManager(Later):
    """Gives a request blocks for a version when a step completes its stretch, and frees the versions before.

    vLLM's base class counts blocks by tokens: so many are said to be there as have the blocks that there are to be.
    """

    def __init__(self, kv_cache_spec: VersionsSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.stretch, self.pages = kv_cache_spec.attention_chunk_size, kv_cache_spec.pages

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *others: Any, **more: Any) -> int:
        return super().get_num_blocks_to_allocate(request_id, self._tokens_of_blocks(num_tokens), *others, **more)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        return super().allocate_new_blocks(request_id, self._tokens_of_blocks(num_tokens), num_tokens_main_model)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """In blocks: those of all versions but the last."""
        return self._tokens_of_blocks(max(0, num_computed_tokens - self.stretch))

    def _tokens_of_blocks(self, tokens: int) -> int:
        return tokens // self.stretch * self.pages * self.block_size

    def offer(
        self, request: Any, tokens: int, retention_interval: int | None, replay_boundaries: Sequence[int]
    ) -> None:
        """Offer the versions that were made of ``tokens``, by those up to the end of the block that they end in.

        vLLM finds a block by tokens and group: here each page is a group of its own, and a version is found only whole.
        If several end in a block only the last is the version at the block's end.
        """
        size = self.block_pool.hash_block_size
        written = tokens // size * size
        known = self.num_cached_block.get(request.request_id, 0) // self.pages
        row = self.req_to_blocks[request.request_id]
        for version in range(known + 1, written // self.stretch + 1):
            end = -(-version * self.stretch // size)
            if end * size // self.stretch == version:
                blocks = row[(version - 1) * self.pages : version * self.pages]
                alone = [self._null_block] * end
                for group, block in zip(_groups_of_pages(self.kv_cache_group_id, self.pages), blocks, strict=True):
                    alone[-1] = block
                    self.block_pool.cache_full_blocks(request, alone, end - 1, end, size, group)
            self.num_cached_block[request.request_id] = version * self.pages

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The most tokens whose whole stretches' rows are there: those in the first stretch need none."""
        stretch, pages = kv_cache_spec.attention_chunk_size, kv_cache_spec.pages
        groups = [page for group in kv_cache_group_ids for page in _groups_of_pages(group, pages)]
        length = max_length // alignment_tokens * alignment_tokens
        while version := length // stretch:
            end = -(-version * stretch // block_pool.hash_block_size)
            cached = block_pool.get_cached_block(block_hashes[end - 1], groups)
            if cached is not None:
                nothing = [block_pool.null_block] * ((version - 1) * pages)
                return tuple(nothing + cached[i : i + pages] for i in range(0, len(groups), pages)), length
            length = (version * stretch - 1) // alignment_tokens * alignment_tokens
        return tuple([] for _ in kv_cache_group_ids), length


MOST_GROUPS = 1 << 12  # of vLLM's; numbers above are those of pages


def _groups_of_pages(group: int, pages: int) -> range:
    """Numbers that stand for pages of a group where vLLM wants a group's."""
    return range(group + MOST_GROUPS, group + MOST_GROUPS * (pages + 1), MOST_GROUPS)


class CleaningSpec(FullAttentionSpec):
    """No blocks. On a CPU vLLM fills new blocks with zeros through layers that keep all tokens alone."""

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return 0


class CleaningManager(Later, FullAttentionManager):
    """Gives none."""

    def get_num_blocks_to_allocate(self, *_: Any, **__: Any) -> int:
        return 0

    def allocate_new_blocks(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def add_local_computed_blocks(self, *_: Any, **__: Any) -> None:
        return

    def offer(self, *_: Any, **__: Any) -> None:
        return


MANAGERS: dict[type, type[Later]] = {
    LogSpec: LogManager,
    RecentSpec: RecentManager,
    StretchSpec: LastManager,
    FoldedSpec: VersionsManager,
    KeysSpec: VersionsManager,
    CleaningSpec: CleaningManager,
}


def register() -> None:
    """Make them known to vLLM's KV-cache manager."""
    register_all_kvcache_specs(None)  # vLLM's own, which it leaves out if it finds others registered
    for spec, manager in MANAGERS.items():
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
