"""When pages of a write log may be shared: once their records have been written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


class LogSpec(FullAttentionSpec):
    """Records of all of a request's tokens."""


class LogManager(FullAttentionManager):
    """Offers a request's blocks to others one step later than attention does.

    vLLM offers blocks when a step is scheduled, to requests of the same step too: attention writes all keys and values
    of a step before it reads any. A memory reads what the chunk before has left, so the requests of a step must not
    need each other's records.
    """

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        written = min(num_tokens, request.num_computed_tokens)
        super().cache_blocks(request, written, retention_interval, replay_boundaries=replay_boundaries)


def register() -> None:
    """Make them known to vLLM's KV-cache manager."""
    register_all_kvcache_specs(None)  # vLLM's own, which it leaves out if it finds others registered
    KVCacheSpecRegistry.register(LogSpec, LogManager, uniform_type_base_spec=LogSpec)
