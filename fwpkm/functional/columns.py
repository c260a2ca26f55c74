"""Reading where all memories are equally far: chunk boundaries are known numbers, and calls are cut there."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fwpkm.functional.tokens import ChunkLosses, Read, Tokens, check_kept_queries
from fwpkm.memory.appendable import Appendable, surely
from fwpkm.memory.formulas import (
    addressing_loss,
    keys_commit,
    read_weights,
    reads_of_slot,
    residual_dtype,
    subkey_usage,
    write_coefficients,
)
from fwpkm.memory.state import MemoryState, number
from fwpkm.ops import key_commit, memory_scan, product_key_address, product_key_scan


def read_columns(state: MemoryState, tokens: Tokens, training: bool) -> tuple[Read, MemoryState, ChunkLosses]:
    """Read and write tokens of ``M`` memories: first the rest of the open chunk, then all others."""
    total = tokens.gate.shape[1]
    first = 0
    if state.has_open:
        first = min(state.config.chunk_size * state.columns - number(state.open_tokens) * state.columns, total)
    reads, losses = [], ChunkLosses.none(state.values)
    for start, stop in ((0, first), (first, total)):
        if start < stop:
            read, state, loss = _read_run(state, tokens.part(start, stop), training)
            reads.append(read)
            losses = losses + loss
    return Read(*(x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*reads, strict=True))), state, losses


def _read_run(state: MemoryState, tokens: Tokens, training: bool) -> tuple[Read, MemoryState, ChunkLosses]:
    """Read tokens that end no later than the open chunk, or begin with a chunk: ``S`` of them, the last one padded."""
    state, config = state.indexed(tokens.query), state.config
    chunk, length = config.chunk_size * state.columns, tokens.gate.shape[1]
    already = number(state.open_tokens) * state.columns
    n_chunks = 1 if state.has_open else -(-length // chunk)
    size = length if n_chunks == 1 else chunk
    padding = n_chunks * size - length

    def by_chunk(x: Tensor) -> Tensor:
        return pad(x, (0, 0) * (x.dim() - 2) + (0, padding)).unflatten(1, (n_chunks, size))

    def by_token(x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, :length]

    run = tokens.map(by_chunk)
    exists = run.mask
    if exists is None and not surely(padding == 0):
        exists = torch.arange(n_chunks * size, device=run.gate.device) < length
        exists = exists.view(1, n_chunks, size).expand(run.gate.shape)
    memories = run.gate.shape[0]
    address = _address(state, tokens, run, exists, training)
    slots, weights = address.slots, read_weights(address.scores, config)
    if exists is not None:
        weights = torch.where(exists.unsqueeze(-1), weights, 0.0)
    coefficients = write_coefficients(weights, config)

    lookahead = config.lookahead * state.columns
    divided, targets, gates = coefficients, run.target, run.gate
    if n_chunks > 1:  # what a single chunk writes is not read in this run
        label = torch.arange(memories * n_chunks, device=slots.device).view(memories, n_chunks, 1).expand(-1, -1, size)
        if exists is not None:
            label = torch.where(exists, label, memories * n_chunks)
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
    if state.waiting is not None and state.has_open:
        waiting_gates = state.last_records(state.waiting.shape[1])[4]
        reads = torch.cat((state.waiting.unsqueeze(1), reads), 2)
        gates = torch.cat((waiting_gates.unsqueeze(1), gates), 2)
    stored = max(0, reads.shape[2] - lookahead)
    storing = _both(gates[:, :, :stored], run.mask, size - stored)
    residuals = storing.unsqueeze(-1) * (run.target[:, :, size - stored :] - reads[:, :, :stored])
    residuals = pad(residuals, (0, 0, size - stored, 0))
    chunks = torch.arange(n_chunks, device=slots.device).add_(state.commits).view(1, -1, 1).expand(run.gate.shape)
    recorded = slots if run.mask is None else torch.where(run.mask.unsqueeze(-1), slots, -1)
    state = state.record([by_token(x) for x in (recorded, coefficients, residuals, chunks, run.gate)], training)

    whole = _whole_chunks(already + length, chunk, n_chunks)
    left = already + length - whole * chunk  # tokens of the chunk that is open now
    waiting = min(left, lookahead)
    read_last = reads[:, -1, : reads.shape[2] - padding]
    state = dataclasses.replace(
        state,
        keys=address.keys,
        open=address.open,
        waiting=None if surely(left == 0) else read_last[:, read_last.shape[1] - waiting :],
        position=state.position + length // state.columns,
        commits=state.commits + whole,
        committed=state.committed + whole * chunk,
    )
    if config.detach_every and state.log is not None:
        bound = state.per_memory(state.commits // config.detach_every * config.detach_every)
        state = dataclasses.replace(state, log=state.log.detach_before(bound))
    shown = slots if run.mask is None else torch.where(run.mask.unsqueeze(-1), slots, 0)
    return Read(*(by_token(x) for x in (output, shown, weights))), state, address.losses


def _whole_chunks(tokens: int, chunk: int, n_chunks: int) -> int:
    """How many of the chunks of a run, of ``tokens`` with those that were open before, end in it.

    Of a single one it is asked, not computed: a graph for texts shorter than a chunk has no tensors of no chunks.
    """
    return tokens // chunk if n_chunks > 1 else 1 if tokens == chunk else 0


def _both(gates: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """Gates of tokens that store the targets of those from ``start`` on, and 0 where such a target is masked."""
    return gates if mask is None else torch.where(mask[:, :, start:], gates, 0.0)


def _is_cut(state: MemoryState, n_chunks: int) -> Tensor | None:
    """Which chunks of a run ``detach_every`` cuts off from those before, ``[S]``, or None."""
    every, first = state.config.detach_every, number(state.commits)
    if not every:
        return None
    numbers = torch.arange(first, first + n_chunks, device=state.values.device)
    return (numbers % every == 0) & (numbers > 0)


def _cut(state: MemoryState, n_chunks: int) -> Tensor | None:
    """``detach_every`` as :func:`memory_scan` takes it."""
    is_cut, every = _is_cut(state, n_chunks), state.config.detach_every
    if is_cut is None or not every:
        return None
    cut = torch.where(is_cut, 0, -1)
    cut[0] = 0 if number(state.commits) >= every else -1
    return cut.expand(state.memories, -1)


def _keys_cut(state: MemoryState, n_chunks: int) -> Tensor | None:
    """``detach_every`` as :func:`product_key_scan` takes it."""
    is_cut = _is_cut(state, n_chunks)
    return None if is_cut is None else is_cut.expand(state.memories, -1)


class _Address(NamedTuple):
    """Where the tokens of a run read, and what that does to keys and open chunk."""

    scores: Tensor  # [M, S, P, H, k]
    slots: Tensor  # [M, S, P, K]
    keys: Tensor
    open: Appendable | None
    losses: ChunkLosses


def _address(state: MemoryState, tokens: Tokens, run: Tokens, exists: Tensor | None, training: bool) -> _Address:
    """Where ``tokens`` read, by the chunks of their ``run``, in which they are what ``exists``."""
    config, keys = state.config, state.keys
    n_chunks, size = run.gate.shape[1:]
    length, chunk = tokens.gate.shape[1], config.chunk_size * state.columns
    already = number(state.open_tokens) * state.columns
    whole = _whole_chunks(already + length, chunk, n_chunks)
    moving = keys_commit(config, training)
    check_kept_queries(state, moving, training)
    before = state.open.columns() if state.open is not None and state.has_open else None
    cut = None if config.key_update == "slow" else _keys_cut(state, n_chunks)
    arguments, rate = (config.score, config.score_eps), config.learning_rate * config.addressing_weight

    def by_chunk(x: Tensor) -> Tensor:
        padded = pad(x, (0, 0) * (x.dim() - 2) + (0, n_chunks * size - length))
        return padded.unflatten(1, (n_chunks, size))

    if before is None and (moving or cut is not None):
        commits = torch.arange(n_chunks, device=keys.device).view(1, -1, 1) < (whole if moving else 0)
        commits = commits.expand(run.gate.shape) if exists is None else commits & exists
        found = product_key_scan(run.query, keys, config.topk, commits, rate, *arguments, cut)
        scores, slots, sub_scores, sub_slots, keys = found
    else:
        if moving:  # several operators take the query: its gradient is to be rounded once, as a sum
            tokens = tokens._replace(query=tokens.query.to(keys.dtype))
        if cut is not None:
            keys = torch.where(cut[:, 0].view(-1, 1, 1, 1, 1), keys.detach(), keys)
        # The addressing loss of keys that do not commit never reaches the queries.
        step = product_key_address(tokens.query, keys, config.topk, *arguments, sub_scores_reach_query=moving)
        if before is not None and moving and whole:
            joined = [
                torch.cat(pair, 1) for pair in zip((before[2], *before[:2]), (tokens.query, *step[2:]), strict=True)
            ]
            mask = None if tokens.mask is None else torch.cat((state.open_mask(), tokens.mask), 1)
            keys = key_commit(joined[0], keys, joined[1], joined[2], mask, rate, config.score)
        used = step[2] if moving or config.key_update == "slow" else step[2].detach()
        scores, slots, sub_scores, sub_slots = (by_chunk(x) for x in (step[0], step[1], used, step[3]))

    losses = _losses(state, (sub_scores, sub_slots), before, exists, whole)
    selected = [x.flatten(1, 2)[:, :length] for x in (sub_scores, sub_slots)]

    def kept(start: int) -> list[Tensor]:
        queries = [tokens.query[:, start:].to(keys.dtype)] if moving else []
        return [x[:, start:] for x in selected] + queries

    if before is not None and state.open is not None:
        window = None if whole else state.open.append(kept(0))
    else:
        window = None if surely(length == whole * chunk) else Appendable.of(kept(whole * chunk))
    return _Address(scores, slots.flatten(-2), keys, window, losses)


def _losses(
    state: MemoryState,
    selected: tuple[Tensor, Tensor],
    before: list[Tensor] | None,
    exists: Tensor | None,
    whole: int,
) -> ChunkLosses:
    """Addressing losses of the ``whole`` chunks of a run, the first of them with the tokens ``before``."""
    sub_scores, sub_slots = selected
    if surely(whole == 0):
        return ChunkLosses.none(sub_scores)
    memories, n_chunks, size, heads = sub_scores.shape[:4]
    n = state.keys.shape[3]
    mask = None if exists is None else exists.flatten(0, 1)
    usage = subkey_usage(sub_scores.flatten(0, 1), sub_slots.flatten(0, 1), mask, n)
    pairs: Tensor | int = size * heads if mask is None else mask.sum(1).view(-1, 1, 1) * heads
    if before is not None:  # a run of a single chunk
        before_mask = None if mask is None else state.open_mask()
        usage = usage + subkey_usage(before[0], before[1], before_mask, n)
        pairs = pairs + (before[0].shape[1] if before_mask is None else before_mask.sum(1).view(-1, 1, 1)) * heads
    if isinstance(pairs, Tensor):
        pairs = pairs.clamp_min(1)
    return ChunkLosses.of(addressing_loss(usage, pairs).view(memories, n_chunks)[:, :whole])
