"""What an engine's memories write, kept for tests: the residuals of each prompt's records, in every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fwpkm_vllm import step
from torch import Tensor
from vllm import LLM

from tests.rounding import by_token


class Kept:
    """Of each prompt and layer, by position. Requests with the same prompt have to have the same continuation."""

    def __init__(self, lookahead: int) -> None:
        self.lookahead = lookahead
        self.layers: list[int] = []  # known by where their values are, in the order in which they read
        self.found: dict[tuple[int, ...], dict[int, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))

    def of(self, prompt: list[int]) -> list[Tensor]:
        """Of each layer ``[1, T, Dv]``, by token."""
        layers = [self.found[tuple(prompt)][layer] for layer in self.layers]
        return [by_token(torch.stack([x[i] for i in range(len(x))]), self.lookahead).unsqueeze(0) for x in layers]


@contextmanager
def keeping(llm: LLM, lookahead: int) -> Iterator[Kept]:
    """Keep what is written from now on."""
    kept, original = Kept(lookahead), step.read_and_write
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def watched(keys: Tensor, values: Tensor, *others: Any) -> Tensor:
        reads = original(keys, values, *others)
        now, layer = others[-1], values.data_ptr()
        if layer not in kept.layers:
            kept.layers.append(layer)
        prompts = [tuple(runner.requests[name].prompt_token_ids) for name in runner.input_batch.req_ids]
        written = now.log.read("residuals", now.batch.owners, now.batch.positions).float()
        places = zip(now.batch.requests.tolist(), now.batch.positions.tolist(), written, strict=True)
        for request, position, residual in places:
            if request >= 0:
                kept.found[prompts[request]][layer][position] = residual
        return reads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "read_and_write", watched)
        yield kept
