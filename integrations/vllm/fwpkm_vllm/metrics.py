"""What memories did, on vLLM's ``/metrics`` page (entry point ``vllm.stat_logger_plugins``)."""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from fwpkm.models import FwPKMConfig
from fwpkm_vllm.records import log_layout

BYTES = [4.0**i for i in range(8, 17)]  # 64 KB to 4 GB


class MemoryMetrics(StatLoggerBase):
    """Counts what finished requests have stored, from how many tokens they had; nothing for other models."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = vllm_config.model_config.hf_config
        self.layers = len(config.fwpkm_layers or ()) if isinstance(config, FwPKMConfig) else 0
        if self.layers:
            self.chunk_size, self.record_bytes = config.fwpkm_chunk_size, log_layout(config).nbytes
            self.chunks, self.log_bytes = _metrics()

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """vLLM calls this after each step."""
        if not self.layers or iteration_stats is None:
            return
        for request in iteration_stats.finished_requests:
            tokens = request.num_prompt_tokens + request.num_generation_tokens - 1  # the last one is not read
            self.chunks.inc(self.layers * (tokens // self.chunk_size))
            self.log_bytes.observe(self.layers * tokens * self.record_bytes)

    def log_engine_initialized(self) -> None:
        pass


@functools.cache
def _metrics() -> tuple[Counter, Histogram]:
    """One of each a process, whatever engines it talks to."""
    return (
        Counter("fwpkm:committed_chunks", "Chunks that the memories of finished requests have committed, all layers."),
        Histogram("fwpkm:request_log_bytes", "Write logs of finished requests, all layers.", buckets=BYTES),
    )
