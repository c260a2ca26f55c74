"""Reading where all memories are equally far: chunk boundaries are known numbers, and calls are cut there."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from fwpkm.functional.tokens import ChunkLosses, Read, Tokens, check_kept_queries, loss_sub_scores
from fwpkm.memory.appendable import Appendable
from fwpkm.memory.formulas import (
    addressing_loss,
    keys_commit,
    read_weights,
    reads_of_slot,
    residual_dtype,
    subkey_usage,
    write_coefficients,
)
from fwpkm.memory.state import MemoryState
from fwpkm.ops import key_commit, memory_scan, product_key_address


def read_columns(state: MemoryState, tokens: Tokens, training: bool) -> tuple[Read, MemoryState, ChunkLosses]:
    """Read and write tokens of ``M`` memories: first the rest of the open chunk, then whole chunks, then the rest."""
    chunk = state.config.chunk_size * state.columns
    total, start, reads = tokens.gate.shape[1], 0, []
    losses = ChunkLosses.none(state.values)
    while start < total:
        missing = chunk - number(state.open_tokens) * state.columns
        whole = (total - start) // chunk if missing == chunk else 0
        stop = start + whole * chunk if whole else min(start + missing, total)
        run = tokens.map(lambda x, part=slice(start, stop): x[:, part])  # type: ignore[misc]
        read, state, loss = _read_run(state, run, max(whole, 1), training)
        reads.append(read)
        losses += loss
        start = stop
    return Read(*(x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*reads, strict=True))), state, losses


def _read_run(
    state: MemoryState, tokens: Tokens, n_chunks: int, training: bool
) -> tuple[Read, MemoryState, ChunkLosses]:
    """Read ``n_chunks`` whole chunks, or a run of tokens that ends no later than the open chunk."""
    state, config = state.indexed(tokens.query), state.config
    run = tokens.map(lambda x: rearrange(x, "m (s p) ... -> m s p ...", s=n_chunks))
    memories, _, size = run.gate.shape
    address = _address(state, run, training)
    slots, weights = address.slots, read_weights(address.scores, config)
    if run.mask is not None:
        weights = torch.where(run.mask.unsqueeze(-1), weights, 0.0)
    coefficients = write_coefficients(weights, config)

    lookahead = config.lookahead * state.columns
    divided, targets, gates = coefficients, run.target, run.gate
    if n_chunks > 1:  # what a single chunk writes is not read in this run
        label = torch.arange(memories * n_chunks, device=slots.device).view(memories, n_chunks, 1).expand(-1, -1, size)
        if run.mask is not None:
            label = torch.where(run.mask, label, memories * n_chunks)
        divided = coefficients / reads_of_slot(slots, label, state.n_slots)
        # Token t stores the target of token t + L.
        stored = max(0, size - lookahead)
        targets = pad(run.target[:, :, size - stored :], (0, 0, 0, size - stored))
        gates = pad(_both(run.gate[:, :, :stored], run.mask, size - stored), (0, size - stored))
    output = memory_scan(
        state.values,
        state.own_slots(slots),
        weights,
        divided,
        targets,
        gates,
        state.committed_log(),
        cut=_cut(state, n_chunks),
        residual_dtype=residual_dtype(config, training),
    )

    # The record of token t holds the residual of token t - L, if that is in the same chunk.
    reads, gates = output, run.gate
    if state.waiting is not None:
        waiting_gates = state.last_records(state.waiting.shape[1])[4]
        reads = torch.cat((state.waiting.unsqueeze(1), reads), 2)
        gates = torch.cat((waiting_gates.unsqueeze(1), gates), 2)
    stored = max(0, reads.shape[2] - lookahead)
    storing = _both(gates[:, :, :stored], run.mask, size - stored)
    residuals = storing.unsqueeze(-1) * (run.target[:, :, size - stored :] - reads[:, :, :stored])
    residuals = pad(residuals, (0, 0, size - stored, 0))
    chunks = torch.arange(n_chunks, device=slots.device).add_(state.commits).view(1, -1, 1).expand(run.gate.shape)
    recorded = slots if run.mask is None else torch.where(run.mask.unsqueeze(-1), slots, -1)
    records = (x.flatten(1, 2) for x in (recorded, coefficients, residuals, chunks, run.gate))
    state = state.record(list(records), training)

    columns = n_chunks * size // state.columns
    commits = state.commits + n_chunks if address.complete else state.commits
    state = dataclasses.replace(
        state,
        keys=address.keys,
        open=address.open,
        waiting=None if address.complete else reads[:, 0, max(0, reads.shape[2] - lookahead) :],
        position=state.position + columns,
        commits=commits,
        committed=state.filled + n_chunks * size if address.complete else state.committed,
    )
    if config.detach_every and state.log is not None:
        bound = state.per_memory(commits // config.detach_every * config.detach_every)
        state = dataclasses.replace(state, log=state.log.detach_before(bound))
    shown = slots if run.mask is None else torch.where(run.mask.unsqueeze(-1), slots, 0)
    return Read(*(x.flatten(1, 2) for x in (output, shown, weights))), state, address.losses


def number(count: int | Tensor) -> int:
    """A count of a state whose memories are equally far."""
    assert isinstance(count, int)
    return count


def _both(gates: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """Gates of tokens that store the targets of those from ``start`` on, and 0 where such a target is masked."""
    return gates if mask is None else torch.where(mask[:, :, start:], gates, 0.0)


def _cut(state: MemoryState, n_chunks: int) -> Tensor | None:
    """``detach_every`` as :func:`memory_scan` takes it."""
    every, first = state.config.detach_every, number(state.commits)
    if not every:
        return None
    numbers = torch.arange(first, first + n_chunks, device=state.values.device)
    cut = torch.where((numbers % every == 0) & (numbers > 0), 0, -1)
    cut[0] = 0 if first >= every else -1
    return cut.expand(state.memories, -1)


class _Address(NamedTuple):
    """Where the tokens of a run read, and what that does to keys and open chunk."""

    scores: Tensor  # [M, S, P, H, k]
    slots: Tensor  # [M, S, P, K]
    keys: Tensor
    open: Appendable | None
    losses: ChunkLosses
    complete: bool


def _address(state: MemoryState, run: Tokens, training: bool) -> _Address:
    config, keys = state.config, state.keys
    _, n_chunks, size = run.gate.shape
    heads, n = keys.shape[1], keys.shape[3]
    moving = keys_commit(config, training)
    check_kept_queries(state, moving, training)
    already = number(state.open_tokens) * state.columns
    complete = already + size == config.chunk_size * state.columns
    before = None if state.open is None else state.open.columns()
    before_mask = None
    if before is not None and run.mask is not None:
        before_mask = state.open_mask()
    if moving or (config.detach_every and config.key_update != "slow"):
        steps, rate = [], config.learning_rate * config.addressing_weight
        for s in range(n_chunks):
            chunk_number = number(state.commits) + s
            if config.detach_every and chunk_number and chunk_number % config.detach_every == 0:
                keys = keys.detach()
            query = run.query[:, s]
            step = product_key_address(query, keys, config.topk, config.score, config.score_eps)
            steps.append(step)
            if moving and complete:
                chunk: tuple[Tensor, ...] = (query, *step[2:])
                mask = None if run.mask is None else run.mask[:, s]
                if before is not None:
                    chunk = tuple(torch.cat(pair, 1) for pair in zip((before[2], *before[:2]), chunk, strict=True))
                    mask = None if mask is None or before_mask is None else torch.cat((before_mask, mask), 1)
                keys = key_commit(chunk[0], keys, chunk[1], chunk[2], mask, rate, config.score)
        scores, slots, sub_scores, sub_slots = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
    else:
        query = run.query.flatten(1, 2)
        found = product_key_address(query, keys, config.topk, config.score, config.score_eps)
        sub_scores = loss_sub_scores(query, keys, found[2], config)
        scores, slots, sub_scores, sub_slots = (
            x.unflatten(1, (n_chunks, size)) for x in (found[0], found[1], sub_scores, found[3])
        )

    losses, window = ChunkLosses.none(scores), None
    if complete:
        mask = None if run.mask is None else run.mask.flatten(0, 1)
        usage = subkey_usage(sub_scores.flatten(0, 1), sub_slots.flatten(0, 1), mask, n)
        pairs: Tensor | int = size * heads if mask is None else mask.sum(1).view(-1, 1, 1) * heads
        if before is not None:
            usage = usage + subkey_usage(before[0], before[1], before_mask, n)
            pairs = pairs + (already * heads if before_mask is None else before_mask.sum(1).view(-1, 1, 1) * heads)
        if isinstance(pairs, Tensor):
            pairs = pairs.clamp_min(1)
        losses = ChunkLosses.of(addressing_loss(usage, pairs))
    else:
        kept = [sub_scores[:, 0], sub_slots[:, 0], *([run.query[:, 0]] if moving else [])]
        window = Appendable.of(kept) if state.open is None else state.open.append(kept)
    return _Address(scores, slots.flatten(-2), keys, window, losses, complete)
