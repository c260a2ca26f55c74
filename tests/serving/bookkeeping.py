"""vLLM's KV-cache manager with the plugin's pages, without a model: run by test_engine.py in a process of its own.

By hand: ``python -m pytest tests/serving/bookkeeping.py --noconftest -o filterwarnings=default``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fwpkm_vllm import sharing
from fwpkm_vllm.sharing import CleaningManager, FoldedSpec, KeysSpec, LogSpec, RecentSpec, StretchSpec, VersionsSpec
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

BUDGET, LONGEST, WINDOW = 70, 300, 5


class Cache:
    """Pages whose content is what they were written from; every request checks what it is to read.

    What a step reads was written by steps before it: all requests of a step are checked before any of them writes.
    """

    def __init__(
        self,
        stretch: int,
        block: int,
        pages: int,
        blocks: int,
        ahead: bool = False,
        rows: Any = KeysSpec,
        alone: Any = None,
    ) -> None:
        kind: dict[str, Any] = {"num_kv_heads": 1, "head_size": 4, "head_size_v": 0, "dtype": torch.uint8}
        kind["page_size_padded"] = 1 << 12
        self.specs = [
            LogSpec(block_size=3 * block, **kind),
            RecentSpec(sliding_window=WINDOW, block_size=block, **kind),
            StretchSpec(attention_chunk_size=stretch, block_size=block, **kind),
            rows(attention_chunk_size=stretch, pages=pages, block_size=block, **kind),
        ]
        if alone is not None:  # beside attention, whose pages vLLM offers at once, and which nobody checks here
            kept = [spec for spec in self.specs if sharing.MANAGERS[type(spec)] is alone]
            self.specs = [FullAttentionSpec(block_size=3 * block, **kind), *kept]
        groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(self.specs)]
        self.in_flight = BUDGET * (1 + ahead)
        self.ahead, self.stretch = ahead, stretch
        self.manager = KVCacheManager(KVCacheConfig(blocks, [], groups), LONGEST, 3 * block, block, self.in_flight)
        self.hasher = get_request_block_hasher(block, sha256)
        self.content: dict[Any, Any] = {}
        self.hits: list[int] = []

    def request(self, name: str, tokens: list[int]) -> Request:
        return Request(name, tokens, SamplingParams(max_tokens=1), None, block_hasher=self.hasher)

    def step(self, *pieces: tuple[Request, int], lost: Sequence[Request] = ()) -> list[Request]:
        """Read the next tokens of requests, those that there are pages for; which these are.

        Those that are ``lost`` are preempted once all have got their pages, before anything is read or written.
        """
        self.manager.new_step_starts()
        found = [(request, self.allocate(request, count)) for request, count in pieces]
        for request in lost:
            self.preempt(request)
        read = [(request, span) for request, span in found if span and request not in lost]
        for write in (False, True):
            for request, (first, end) in read:
                for spec, blocks in zip(
                    self.specs, self.manager.coordinator.get_blocks(request.request_id), strict=True
                ):
                    if type(spec) is FullAttentionSpec:
                        continue
                    check = self.versions if isinstance(spec, VersionsSpec) else self.records
                    check(spec, blocks, request.all_token_ids, first, end, write)
        for request, (first, end) in read:
            request.num_computed_tokens = end
            request.num_in_flight_tokens = end - first if self.ahead else 0
        return [request for request, _ in read]

    def preempt(self, request: Request) -> None:
        self.manager.free(request)
        request.num_computed_tokens = request.num_in_flight_tokens = 0

    def allocate(self, request: Request, count: int) -> tuple[int, int] | None:
        """From where to where a request reads; None if there are no pages for it."""
        known = {}
        if not request.num_computed_tokens:
            blocks, hit, _ = self.manager.get_computed_blocks(request)
            known = {"num_new_computed_tokens": hit, "new_computed_blocks": blocks}
        first = request.num_computed_tokens + known.get("num_new_computed_tokens", 0)
        count = min(count, request.num_tokens - first)
        if self.manager.allocate_slots(request, count, full_sequence_must_fit=not first, **known) is None:
            return None
        if known:
            self.hits.append(first)
        return first, first + count

    def records(self, spec: Any, blocks: Any, tokens: list[int], first: int, end: int, write: bool) -> None:
        start = 0 if isinstance(spec, LogSpec) else spec.first_needed(first)
        for i in range(first, end) if write else range(start, first):
            block, place = blocks[i // spec.block_size], i % spec.block_size
            written = (type(spec), tokens[: i + 1])
            assert not block.is_null
            if write:
                self.content[block.block_id, place] = written
            assert self.content[block.block_id, place] == written
        if not isinstance(spec, LogSpec):
            held = sum(not block.is_null for block in blocks)
            assert held <= spec.max_admission_blocks_per_request(self.in_flight, LONGEST)

    def versions(self, spec: VersionsSpec, blocks: Any, tokens: list[int], first: int, end: int, write: bool) -> None:
        length, pages = spec.attention_chunk_size, spec.pages
        assert len(blocks) == end // length * pages
        made = range(first // length + 1, end // length + 1)
        for version in made if write else range(max(1, first // length), first // length + 1):
            for place, block in enumerate(blocks[(version - 1) * pages : version * pages]):
                written = (type(spec), tokens[: version * length], place)
                assert not block.is_null
                if write:
                    self.content[block.block_id, 0] = written
                assert self.content[block.block_id, 0] == written
        held = sum(not block.is_null for block in blocks)
        assert held <= spec.max_admission_blocks_per_request(self.in_flight, LONGEST)


def serve_at_random(cache: Cache, stretch: int) -> None:
    draw = random.Random(0)
    free = cache.manager.block_pool.get_num_free_blocks()
    texts = [[draw.randrange(100) for _ in range(LONGEST)] for _ in range(3)]
    running: list[Request] = []
    for name in range(60):
        common, cut = draw.choice(texts), draw.randrange(LONGEST)
        for i in range(draw.choice([1, 1, 3])):
            own = [draw.randrange(100) for _ in range(LONGEST)]
            running.append(
                cache.request(f"{name}.{i}", (common[:cut] + own[cut:])[: max(cut, draw.randrange(2, LONGEST))])
            )
        for _ in range(draw.randrange(12)):
            pieces = [(request, draw.choice([1, 1, 5, 30, BUDGET])) for request in running]
            lost = [request for request in running if draw.random() < 0.2]
            read = cache.step(*pieces, lost=lost)
            for request in [x for x in running if x not in lost]:
                if request not in read or draw.random() < 0.1:
                    cache.preempt(request)
                elif request.num_computed_tokens == request.num_tokens:
                    cache.manager.free(request)
                    running.remove(request)
    for request in running:
        cache.manager.free(request)
    assert cache.manager.block_pool.get_num_free_blocks() == free
    assert sum(hit >= stretch for hit in cache.hits) > 5, "versions were hardly shared"


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
def test_pages_are_those_of_the_tokens_before(stretch, block, pages, rows, ahead):
    """Requests that begin alike come, alone and many at once, share, lose their pages, also in the step that they were
    to be read in, and go, in any order; no page is lost for good.
    """
    sharing.register()
    init_none_hash(sha256)
    serve_at_random(Cache(stretch, block, pages, blocks=400, ahead=ahead, rows=rows), stretch)


@pytest.mark.parametrize(
    "manager", sorted(set(sharing.MANAGERS.values()) - {CleaningManager}, key=lambda x: x.__name__)
)
@pytest.mark.parametrize("fault", ["in the step", "lost"])
def test_pages_that_are_offered_before_they_are_written_are_noticed(monkeypatch, manager, fault):
    """Of each kind alone: to requests of the same step, or although their request was preempted in it."""

    def in_the_step(self, request, num_tokens, retention_interval=None, *, replay_boundaries):
        self.offer(request, num_tokens, retention_interval, replay_boundaries)

    def lost(self, request_id):
        if request_id in self.scheduled:
            self.offer(*self.scheduled.pop(request_id))

    faults = {"in the step": ("cache_blocks", in_the_step), "lost": ("_offer_what_is_written", lost)}
    monkeypatch.setattr(manager, *faults[fault])
    sharing.register()
    init_none_hash(sha256)
    with pytest.raises((AssertionError, KeyError)):
        serve_at_random(Cache(20, 16, 2, blocks=400, alone=manager), 20)


@pytest.mark.parametrize("chunk_size", [7, 16, 20, 64, 150])
def test_prefixes_are_found_again_wherever_blocks_end(chunk_size):
    """Also in the midst of a step that went over several chunks, and of a request that had no more than one step."""
    sharing.register()
    init_none_hash(sha256)
    cache = Cache(chunk_size, 16, 2, blocks=600)
    text = list(range(LONGEST))
    long = cache.request("long", text)
    while long.num_computed_tokens < LONGEST:
        assert cache.step((long, BUDGET))
    cache.manager.free(long)
    for common in (50, 64, 100, 150, 200, 240):
        other = cache.request(str(common), text[:common] + [0] * 10)
        assert cache.step((other, 1))
        cache.manager.free(other)
    short = [cache.request(str(i), [7] * 60) for i in range(2)]
    for request in short:
        assert cache.step((request, BUDGET))
        cache.manager.free(request)
    assert cache.hits == [0, 48, 48, 96, 144, 192, 240, 0, 48]
