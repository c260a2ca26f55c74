"""Recall after one or more readings of a text: each question is asked of a model that has just read it."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fwpkm.checks import require
from fwpkm.data.codec import Codec
from fwpkm.data.questions import Haystack, Question
from fwpkm.evaluation.recall import by_depth, lower_bound
from fwpkm.evaluation.stream import OnTokens, ignored
from fwpkm.models import FwPKMCache, FwPKMForCausalLM


def ask_after_readings(
    model: FwPKMForCausalLM,
    haystacks: Sequence[Haystack],
    readings: int = 1,
    codec: Codec | None = None,
    call: int = 4096,
    on_tokens: OnTokens = ignored,
) -> list[dict[str, Any]]:
    """Read each text ``readings`` times, and after each ask all its questions.

    A reading ends in a commit. The next one begins with attention and convolutions anew: only the memories go on. A
    question follows the reading directly (attention sees its end), and each is asked by itself: what it and its answer
    write is gone when the next one is asked.

    An answer is right if all its tokens are the likeliest ones after the prompt and the true tokens before.

    Returns:
        for each number of ``readings``, from 1 up: ``texts``, ``questions``, ``exact`` (the share of right answers),
        ``exact_lower95``, ``tokens_right`` (the share of the answers' tokens), ``depths`` as in
        :meth:`fwpkm.evaluation.recall.Recall.summary`, and ``seconds`` for reading and asking.
    """
    require(readings >= 1, "readings", readings, "a positive integer")
    codec = codec or Codec()
    model.eval()
    right: list[list[NDArray[np.bool_]]] = [[] for _ in range(readings)]
    seconds = [0.0] * readings
    for haystack in haystacks:
        tokens = torch.from_numpy(codec.encode(haystack.text).astype("int64")).unsqueeze(0).to(model.device)
        cache = FwPKMCache(model.config)
        for i in range(readings):
            start = time.perf_counter()
            cache = FwPKMCache.remembering(model.config, {j: s.memory for j, s in cache.memories.items()})
            for piece in tokens.split(call, 1):
                model.read(piece, cache)
                on_tokens(piece.numel())
            cache.flush()
            right[i] += [_right(model, codec, fork(model, cache), question) for question in haystack.questions]
            seconds[i] += time.perf_counter() - start
    depths = np.array([q.place / len(h.text) for h in haystacks for q in h.questions])
    return [
        {"readings": i + 1, "texts": len(haystacks), **_summary(right[i], depths), "seconds": seconds[i]}
        for i in range(readings)
    ]


def fork(model: FwPKMForCausalLM, cache: FwPKMCache) -> FwPKMCache:
    """A cache that goes on by itself. The memories' states never change, so they are shared."""
    other = FwPKMCache(model.config)
    other.layers = copy.deepcopy(cache.layers)
    other.memories, other.tokens, other.padded = dict(cache.memories), cache.tokens, cache.padded
    return other


@torch.no_grad()
def _right(model: FwPKMForCausalLM, codec: Codec, cache: FwPKMCache, question: Question) -> NDArray[np.bool_]:
    """Which tokens of the answer are right."""
    prompt, whole = (codec.encode(text) for text in (question.prompt, question.prompt + question.answer))
    both = min(prompt.size, whole.size)  # a tokenizer may join the end of the prompt to the answer
    known = int(np.logical_and.accumulate(prompt[:both] == whole[:both]).sum())
    tokens = torch.from_numpy(whole.astype("int64")).to(model.device)
    given = model(tokens[None, :-1], cache=cache).logits[0, known - 1 :].argmax(-1)
    right: NDArray[np.bool_] = (given == tokens[known:]).cpu().numpy()
    return right


def _summary(right: Sequence[NDArray[np.bool_]], depths: NDArray[np.float64]) -> dict[str, Any]:
    exact = np.array([answer.all() for answer in right])
    return {
        "questions": exact.size,
        "exact": float(exact.mean()),
        "exact_lower95": lower_bound(int(exact.sum()), exact.size),
        "tokens_right": float(np.concatenate(right).mean()),
        "depths": by_depth(exact, depths),
    }
