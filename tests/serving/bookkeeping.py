"""vLLM's KV-cache manager with the plugin's pages, without a model: run by test_engine.py in a process of its own.

By hand: ``python -m pytest tests/serving/bookkeeping.py --noconftest -o filterwarnings=default``.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fwpkm_vllm import sharing
from fwpkm_vllm.sharing import FoldedSpec, KeysSpec, LogSpec, StretchSpec, VersionsSpec
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

BUDGET, LONGEST = 70, 300


class Cache:
    """Pages whose content is what they were written from; every request checks what it is to read."""

    def __init__(
        self, stretch: int, block: int, pages: int, blocks: int, ahead: bool = False, rows: Any = KeysSpec
    ) -> None:
        kind: dict[str, Any] = {"num_kv_heads": 1, "head_size": 4, "head_size_v": 0, "dtype": torch.uint8}
        kind["page_size_padded"] = 1 << 12
        self.specs = [
            LogSpec(block_size=3 * block, **kind),
            StretchSpec(attention_chunk_size=stretch, block_size=block, **kind),
            rows(attention_chunk_size=stretch, pages=pages, block_size=block, **kind),
        ]
        groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(self.specs)]
        self.in_flight = BUDGET * (1 + ahead)
        self.ahead, self.stretch = ahead, stretch
        self.manager = KVCacheManager(KVCacheConfig(blocks, [], groups), LONGEST, 3 * block, block, self.in_flight)
        self.hasher = get_request_block_hasher(block, sha256)
        self.content: dict[Any, Any] = {}
        self.hits: list[int] = []

    def request(self, name: str, tokens: list[int]) -> Request:
        return Request(name, tokens, SamplingParams(max_tokens=1), None, block_hasher=self.hasher)

    def step(self, request: Request, count: int) -> bool:
        """Read the next tokens of a request; False if there are no pages for them."""
        known = {}
        if not request.num_computed_tokens:
            blocks, hit, _ = self.manager.get_computed_blocks(request)
            known = {"num_new_computed_tokens": hit, "new_computed_blocks": blocks}
        first = request.num_computed_tokens + known.get("num_new_computed_tokens", 0)
        count = min(count, request.num_tokens - first)
        if self.manager.allocate_slots(request, count, full_sequence_must_fit=not first, **known) is None:
            return False
        if known:
            self.hits.append(first)
        tokens, end = request.all_token_ids, first + count
        for spec, blocks in zip(self.specs, self.manager.coordinator.get_blocks(request.request_id), strict=True):
            if isinstance(spec, VersionsSpec):
                self.check_versions(spec, blocks, tokens, first, end)
                continue
            start = first // self.stretch * self.stretch if isinstance(spec, StretchSpec) else 0
            places = [(blocks[i // spec.block_size], i % spec.block_size) for i in range(end)]
            for i in range(start, first):
                block, place = places[i]
                assert not block.is_null
                assert self.content[block.block_id, place] == (type(spec), tokens[: i + 1])
            for i in range(first, end):
                block, place = places[i]
                self.content[block.block_id, place] = (type(spec), tokens[: i + 1])
            if isinstance(spec, StretchSpec):
                held = sum(not block.is_null for block in blocks)
                assert held <= spec.max_admission_blocks_per_request(self.in_flight, LONGEST)
        request.num_computed_tokens = end
        request.num_in_flight_tokens = count if self.ahead else 0
        return True

    def check_versions(self, spec: VersionsSpec, blocks: Any, tokens: list[int], first: int, end: int) -> None:
        length, pages = spec.attention_chunk_size, spec.pages
        assert len(blocks) == end // length * pages
        for version in range(max(1, first // length), end // length + 1):
            for place, block in enumerate(blocks[(version - 1) * pages : version * pages]):
                written = (type(spec), tokens[: version * length], place)
                assert not block.is_null
                if version * length <= first:
                    assert self.content[block.block_id, 0] == written
                else:
                    self.content[block.block_id, 0] = written
        held = sum(not block.is_null for block in blocks)
        assert held <= spec.max_admission_blocks_per_request(self.in_flight, LONGEST)


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "a step ahead"])
@pytest.mark.parametrize(
    ("stretch", "block", "pages", "rows"),
    [
        (16, 16, 2, KeysSpec),
        (64, 16, 3, KeysSpec),
        (20, 16, 2, KeysSpec),
        (7, 16, 1, KeysSpec),
        (50, 8, 4, KeysSpec),
        (128, 8, 2, KeysSpec),
        (96, 16, 6, FoldedSpec),
    ],
)
def test_versions_are_those_of_the_tokens_before(stretch, block, pages, rows, ahead):
    """Requests that begin alike come, share, lose their pages, and go, in any order; no page is lost for good."""
    sharing.register()
    init_none_hash(sha256)
    draw = random.Random(0)
    cache = Cache(stretch, block, pages, blocks=330, ahead=ahead, rows=rows)
    free = cache.manager.block_pool.get_num_free_blocks()
    texts = [[draw.randrange(100) for _ in range(LONGEST)] for _ in range(3)]
    running: list[Request] = []
    for name in range(60):
        common, own = draw.choice(texts), [draw.randrange(100) for _ in range(LONGEST)]
        cut, length = draw.randrange(LONGEST), draw.randrange(2, LONGEST)
        running.append(cache.request(str(name), (common[:cut] + own[cut:])[:length]))
        for _ in range(draw.randrange(12)):
            for request in list(running):
                if draw.random() < 0.1 or not cache.step(request, draw.choice([1, 1, 5, 30, BUDGET])):
                    cache.manager.free(request)
                    request.num_computed_tokens = request.num_in_flight_tokens = 0
                elif request.num_computed_tokens == request.num_tokens:
                    cache.manager.free(request)
                    running.remove(request)
    for request in running:
        cache.manager.free(request)
    assert cache.manager.block_pool.get_num_free_blocks() == free
    assert sum(hit >= stretch for hit in cache.hits) > 5, "versions were hardly shared"


@pytest.mark.parametrize("chunk_size", [7, 16, 20, 64, 150])
def test_prefixes_are_found_again_wherever_blocks_end(chunk_size):
    """Also in the midst of a step that went over several chunks."""
    sharing.register()
    init_none_hash(sha256)
    cache = Cache(chunk_size, 16, 2, blocks=600)
    text = list(range(LONGEST))
    long = cache.request("long", text)
    for _ in range(5):
        assert cache.step(long, BUDGET)
    cache.manager.free(long)
    for common in (50, 64, 100, 150, 200, 240):
        other = cache.request(str(common), text[:common] + [0] * 10)
        assert cache.step(other, 1)
        cache.manager.free(other)
    assert cache.hits == [0, 48, 48, 96, 144, 192, 240]
