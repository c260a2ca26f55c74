"""A token at a time after contexts of different lengths, and a long text in pieces."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fwpkm
from benchmarks import timing
from benchmarks.cases import Case, draw, without_near_ties
from benchmarks.check import TOLERANCE, WrongResultError, check_memories
from fwpkm import reference
from fwpkm.memory import FastWeights, MemoryConfig
from fwpkm.memory.state import MemoryState
from fwpkm.ops import product_key_address

DISTRIBUTIONS = ("uniform", "Zipf", "one hot slot")
BANK = 4096  # different residuals in a log
CHUNKS = 8


class Records(NamedTuple):
    """A log of ``R`` tokens, a row a memory, with the fields of :class:`fwpkm.memory.WriteLog`."""

    slots: Tensor  # [B, R, k]
    coefficients: Tensor  # [B, R, k]
    residuals: Tensor  # [B, R, Dv]
    chunks: Tensor  # [B, R]
    gates: Tensor  # [B, R]


def addressed(case: Case, distribution: str, count: int, generator: torch.Generator) -> Tensor:
    """The slots ``[count]`` that tokens ask for first."""
    if distribution == "one hot slot":
        return torch.full((count,), case.n_slots // 3)
    if distribution == "uniform":
        return torch.randint(case.n_slots, (count,), generator=generator)
    odds = 1 / torch.arange(1, case.n_slots + 1, dtype=torch.float64)
    rank = torch.searchsorted(odds.cumsum(0) / odds.sum(), torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.randperm(case.n_slots, generator=generator)[rank.clamp_max(case.n_slots - 1)]


def queries_for(slots: Tensor, keys: Tensor) -> Tensor:
    """Queries ``[T, 1, Dk]`` that have these slots' sub-keys; ``keys [1, 2, n, Dk/2]``."""
    n = keys.shape[2]
    return torch.cat((keys[0, 0, slots // n], keys[0, 1, slots % n]), -1).unsqueeze(1)


def records(case: Case, weights: FastWeights, distribution: str, batch: int, length: int) -> Records:
    """What ``length`` tokens would have stored, with random residuals."""
    generator = torch.Generator().manual_seed(4)
    query = queries_for(addressed(case, distribution, length, generator), weights.keys)
    scores, slots, _, _ = product_key_address(query.unsqueeze(0), weights.all_keys, case.topk)
    coefficients = scores[0, :, 0].softmax(-1) * (case.topk * case.chunk / (case.chunk - 1))
    slots = slots[0, :, 0]
    residuals = torch.randn(BANK, case.value_dim, generator=generator) * 0.1
    order = torch.arange(length) % BANK

    def by_memory(x: Tensor) -> Tensor:  # every memory has seen the same tokens in another order
        return torch.stack([x.roll(7919 * memory, 0) for memory in range(batch)])

    return Records(
        by_memory(slots),
        by_memory(coefficients),
        residuals[order].expand(batch, -1, -1).contiguous(),
        (torch.arange(length) // case.chunk).expand(batch, -1).contiguous(),
        torch.rand(batch, length, generator=generator),
    )


def state_of(config: MemoryConfig, weights: FastWeights, log: Records) -> MemoryState:
    """The state after the records' tokens, whole chunks all of them."""
    batch, length = log.gates.shape
    state = MemoryState.start(weights, config, batch).record(log, training=False)
    chunks = length // config.chunk_size
    return dataclasses.replace(state, position=length, commits=chunks, committed=length)


def expected_read(log: Records, weights: FastWeights, query: Tensor, case: Case) -> Tensor:
    """What the first memory gives for ``query [1, Dk]``: in float64, from every record (docs/design.md, section 3)."""
    scores, slots, _, _ = reference.product_key_address(query[None, None], weights.all_keys, case.topk)
    slots, read_weights = slots.flatten(), scores.flatten().softmax(-1)
    hits = log.slots[0].unsqueeze(-1) == slots  # [R, k, K]
    chunks = log.chunks[0]
    reads = torch.zeros(int(chunks[-1]) + 1, slots.numel(), dtype=torch.float64).index_add_(
        0, chunks, hits.double().sum(1)
    )
    written = (log.coefficients[0].double().unsqueeze(-1) * hits).sum(1) / reads[chunks].clamp_min(1)  # [R, K]
    stored = chunks[1:] == chunks[:-1]  # the residual of a token is in the record of the next one of its chunk
    values = weights.values[slots].double() + (written[:-1] * stored.unsqueeze(1)).T @ log.residuals[0, 1:].double()
    return read_weights @ values


@torch.no_grad()
def decode(case: Case, contexts: Sequence[int], batches: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """Seconds a token after each context, contexts interleaved; the first token is compared and not timed.

    After the longest one, also the mean of ``CHUNKS`` chunks: with their commits, and what the log's index takes.

    Raises:
        WrongResultError: if a read differs from that of the dense memory in float64.
    """
    inputs = draw(dataclasses.replace(case, tokens=1))
    weights, config, rows = inputs.weights, case.config, []
    generator = torch.Generator().manual_seed(5)
    for batch in batches:
        for distribution in DISTRIBUTIONS:
            asked = addressed(case, distribution, batch * (tokens + 1), generator)
            queries = queries_for(asked, weights.keys).view(tokens + 1, batch, 1, 1, -1)
            target, gate = torch.randn(batch, 1, case.value_dim, generator=generator), torch.full((batch, 1), 0.5)
            states: dict[int, MemoryState] = {}
            for context in contexts:
                log = records(case, weights, distribution, batch, context)
                result = fwpkm.fast_weight_memory(queries[0], target, gate, state_of(config, weights, log), config)
                expected = expected_read(log, weights, queries[0, 0, 0], case)
                error = float((result.output[0, 0].double() - expected).abs().max() / expected.abs().max())
                if not error <= TOLERANCE:
                    raise WrongResultError(f"decode at {context}, {distribution}: a read is off by {error:.2g}")
                states[context] = result.state
                del log, result
            seconds: dict[int, list[float]] = {context: [] for context in contexts}
            for query in queries[1:]:
                for context in contexts:
                    start = time.perf_counter()
                    result = fwpkm.fast_weight_memory(query, target, gate, states[context], config)
                    seconds[context].append(time.perf_counter() - start)
                    states[context] = result.state
            first = statistics.median(seconds[contexts[0]])
            found = [
                {"batch": batch, "addresses": distribution, "context": context}
                | timing.summary(seconds[context])
                | {"ratio": statistics.median(seconds[context]) / first}
                for context in contexts
            ]
            state, start = states[contexts[-1]], time.perf_counter()
            for i in range(CHUNKS * case.chunk):
                state = fwpkm.fast_weight_memory(queries[1 + i % tokens], target, gate, state, config).state
            found[-1]["mean_of_chunks"] = (time.perf_counter() - start) / (CHUNKS * case.chunk)
            rows += found
    return rows


def check_pieces(case: Case, piece: int) -> dict[str, float]:
    """A text read in pieces has the reference's outputs.

    Raises:
        WrongResultError: if not.
    """
    inputs = draw(case)
    query, _ = without_near_ties(case, inputs.query, inputs.keys, lambda x: x.double())
    inputs = dataclasses.replace(inputs, query=query)

    def in_pieces(x: Any, case: Case) -> Tensor:
        memory: FastWeights | MemoryState = x.weights
        outputs = []
        for start in range(0, case.tokens, piece):
            part = slice(start, start + piece)
            read = fwpkm.fast_weight_memory(x.query[:, part], x.target[:, part], x.gate[:, part], memory, case.config)
            memory = read.state
            outputs.append(read.output)
        return torch.cat(outputs, 1)

    return check_memories(case, inputs, {"in pieces": lambda inputs, case: in_pieces})["in pieces"]


@torch.no_grad()
def prefill(case: Case, piece: int) -> dict[str, Any]:
    """Tokens a second in each quarter of a text of ``case.tokens`` read in pieces."""
    inputs = draw(dataclasses.replace(case, tokens=piece))
    memory: FastWeights | MemoryState = inputs.weights
    generator = torch.Generator().manual_seed(6)
    seconds = []
    for _ in range(case.tokens // piece):
        query = torch.randn(inputs.query.shape, generator=generator)
        start = time.perf_counter()
        memory = fwpkm.fast_weight_memory(query, inputs.target, inputs.gate, memory, case.config).state
        seconds.append(time.perf_counter() - start)
    quarter = len(seconds) // 4
    quarters = [seconds[i * quarter : (i + 1) * quarter] for i in range(4)]
    return {
        "tokens": case.tokens,
        "piece": piece,
        "tokens_per_second": [quarter * piece / sum(part) for part in quarters],
        "piece_seconds": [timing.summary(part) for part in quarters],
    }
