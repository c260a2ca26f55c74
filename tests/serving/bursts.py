"""Requests that begin alike and arrive in one step, in vLLM: run by test_engine.py in a process of its own.

By hand: ``python -m pytest tests/serving/bursts.py --noconftest -o filterwarnings=default``.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from tests.serving import scenarios  # which sets vLLM's environment

# isort: split
import pytest
import torch
from fwpkm_vllm.pages import RecordPages
from fwpkm_vllm.sharing import Later
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from fwpkm.models import FwPKMForCausalLM
from tests.serving.scenarios import FAST, GREEDY, LIMIT, SHORT, check, engine, generate, make, prompts, worst

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "keys that move": (FAST, {}),
    "folded logs": (SHORT, LIMIT),
    "all of it": (FAST | SHORT, LIMIT),
}
NOTHING = {"fwpkm_lookahead": 0, "fwpkm_query_conv": 1}  # a token needs no recent one


def dirty(llm: LLM) -> None:
    """Fill every page that nobody has or can find with NaN and slots below 0."""
    blocks = scenarios.scheduler(llm).kv_cache_manager.block_pool.blocks
    unused = [x.block_id for x in blocks if not x.ref_cnt and not x.block_hash and not x.is_null]
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        if isinstance(layer, RecordPages):
            layer.kv_cache[unused] = 0xFF


def unlike(llm: LLM, model: FwPKMForCausalLM, **sampling: Any) -> tuple[list[int], float]:
    """What each of two requests finds that go on in one step from what one before has left, and how wrong they are.

    It has left its log up to 96 tokens, and of the last ones nothing.
    """
    (start,) = prompts(96)
    generate(llm, [start], max_tokens=2)
    dirty(llm)
    texts = [[*start, 1], [*start, 2, 3]]
    results = generate(llm, texts, max_tokens=25, **sampling)
    outputs = [(text, x) for text, result in zip(texts, results, strict=True) for x in result.outputs]
    differences = torch.tensor([worst(model, text, x, greedy=False) for text, x in outputs])
    return [x.num_cached_tokens for x in results], differences.max().item()  # NaN if any is


def test_pages_that_are_offered_in_their_step_are_noticed(tmp_path, monkeypatch):
    """By the smallest case and by the machine."""

    def at_once(self, request, num_tokens, retention_interval=None, *, replay_boundaries):
        self.offer(request, num_tokens, retention_interval, replay_boundaries)

    monkeypatch.setattr(Later, "cache_blocks", at_once)
    model = make(tmp_path)
    with engine(tmp_path, **MACHINE) as llm:
        hits, difference = unlike(llm, model)
        assert hits == [0, 96]
        assert not difference < 1e-4
        with pytest.raises(AssertionError):
            Arrivals(llm, model).run(200)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (NOTHING, "as it is"),
        (NOTHING | {"fwpkm_query_conv": 0}, "all of it"),
        ({"fwpkm_lookahead": 0}, "as it is"),
        ({"fwpkm_query_conv": 1}, "keys that move"),
    ],
)
def test_prefixes_are_found_however_few_recent_tokens_are_needed(tmp_path, fields, kind):
    model = make(tmp_path, **KINDS[kind][0] | fields)
    (text,) = prompts(300)
    with engine(tmp_path, **KINDS[kind][1]) as llm:
        for expected in (0, 288):
            results = generate(llm, [text], max_tokens=25)
            check(model, [text], results)
            assert results[0].num_cached_tokens == expected
        others = [text[:200] + own for own in prompts(5, 30, 60)]
        for _ in range(2):
            results = generate(llm, others, max_tokens=25)
            check(model, others, results)
        assert [x.num_cached_tokens for x in results] == [192, 192, 192]


def test_a_prompt_that_had_one_step_is_found(tmp_path):
    """Its pages are offered as it gives them back: no step comes after."""
    model = make(tmp_path)
    with engine(tmp_path, max_num_batched_tokens=256) as llm:
        for length in (96, 192):
            (text,) = prompts(length + 1, seed=length)
            for expected in (0, length):
                results = generate(llm, [text], max_tokens=1)
                check(model, [text], results)
                assert results[0].num_cached_tokens == expected


class Arrivals:
    """Requests that begin alike come in one step, sample, lose their pages, are aborted, end, in any order; each is
    compared with the model on its tokens alone.
    """

    def __init__(self, llm: LLM, model: FwPKMForCausalLM) -> None:
        self.llm, self.model, self.draw = llm, model, random.Random(0)
        self.scheduler = scenarios.scheduler(llm)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.documents = prompts(600, 600, seed=11)
        self.texts: dict[str, list[int]] = {}  # of those that are served
        self.taken: list[Any] = []
        self.counts: Counter[str] = Counter()
        preempt = self.scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.counts["preempted"] += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counting

    def arrive(self) -> None:
        """One request, or several that share a prefix; some are twice the same."""
        if len(self.texts) > 8:
            return
        draw, document = self.draw, self.draw.choice(self.documents)
        common = draw.choice([30, 95, 96, 97, 100, 192, 200, 290, 500])
        tails = prompts(
            *(draw.choice([0, 1, 2, 20, 70]) for _ in range(draw.choice([1, 2, 4]))), seed=draw.randrange(99)
        )
        for own in tails:
            n = draw.choice([1, 1, 2])
            params = SamplingParams(**GREEDY | {"n": n, "temperature": float(n > 1)})
            params.max_tokens, params.output_kind = draw.choice([1, 2, 5, 30]), RequestOutputKind.FINAL_ONLY
            self.counts["requests"] += 1
            name = str(self.counts["requests"])
            self.texts[name] = document[:common] + own
            self.llm.llm_engine.add_request(name, {"prompt_token_ids": self.texts[name]}, params)
        self.counts["bursts"] += len(tails) > 1

    def step(self) -> None:
        for _ in range(self.draw.choice([1, 1, 2, 5, 20])):
            dirty(self.llm)
            for result in self.llm.llm_engine.step():
                text = self.texts.pop(result.request_id)
                for completion in result.outputs:
                    assert worst(self.model, text, completion, greedy=False) < 1e-4, result.num_cached_tokens
                self.counts["checked"] += 1
                self.counts["found"] += result.num_cached_tokens > 0

    def squeeze(self) -> None:
        """Others take the free pages: who needs one is preempted."""
        if not self.taken:
            self.taken = self.pool.get_new_blocks(max(0, self.pool.get_num_free_blocks() - self.draw.randrange(12)))

    def relax(self) -> None:
        self.pool.free_blocks(self.taken)
        self.taken = []

    def abort(self) -> None:
        if self.texts and self.draw.random() < 0.5:
            name = self.draw.choice(list(self.texts))
            del self.texts[name]
            self.llm.llm_engine.abort_request([name])

    def forget(self) -> None:
        """Nothing of before is found any more; who is being served begins again."""
        if not self.taken and self.draw.random() < 0.2:
            assert self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    def run(self, actions: int) -> None:
        free = self.pool.get_num_free_blocks()
        everything = [self.arrive, self.arrive, self.step, self.step, self.squeeze, self.relax, self.abort, self.forget]
        for _ in range(actions):
            self.draw.choice(everything)()
        self.relax()
        while self.texts:
            self.step()
        assert self.pool.get_num_free_blocks() == free


MACHINE: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 12, "max_model_len": 1024}
MACHINE["num_gpu_blocks_override"] = 600


@pytest.mark.parametrize(("kind", "ahead"), [*((kind, True) for kind in KINDS), ("all of it", False)])
def test_what_a_request_gets_depends_on_nobody_else(tmp_path, kind, ahead):
    """Also where steps are scheduled while others are under way (``async_scheduling``)."""
    fields, options = KINDS[kind]
    model = make(tmp_path, **fields)
    with engine(tmp_path, async_scheduling=ahead, **MACHINE | options) as llm:
        hits, difference = unlike(llm, model)
        assert difference < 1e-4
        assert hits == [0, 0], "neither may rely on what the other writes"
        assert unlike(llm, model, n=2, temperature=1.0)[1] < 1e-4
        assert unlike(llm, model)[0] == [96, 96]
        arrivals = Arrivals(llm, model)
        arrivals.run(200)
    assert arrivals.counts["bursts"] > 10
    assert arrivals.counts["found"] > 10
    assert arrivals.counts["preempted"] > 3
