"""Reading where memories are differently far: masks and packed sequences, in shapes that do not depend on them.

Each memory sees its unmasked tokens in order. They get *coordinates*: the open chunk's tokens come first, from 0 on,
then the call's. A chunk starts at a coordinate; the chunks that start in ``[sC, (s + 1)C)`` are read in *cell* ``s``:
one of them at most is not the first of its sequence (it goes on from the cell before), and one at most ends in time to
commit, so cell after cell gives what chunk after chunk gives. Without resets cell ``s`` has coordinates
``[sC, (s + 1)C)``, with resets its last chunk may reach to ``(s + 2)C``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fwpkm.functional.tokens import ChunkLosses, Read, Tokens, check_kept_queries
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
from fwpkm.memory.packing import last, rows, unmasked_first
from fwpkm.memory.state import COUNTS, MemoryState
from fwpkm.ops import key_commit, memory_scan, product_key_address


def read_ragged(
    state: MemoryState, tokens: Tokens, reset: Tensor | None, training: bool
) -> tuple[Read, MemoryState, ChunkLosses]:
    """Read and write tokens of ``M`` memories, some of them masked, some the first of a new sequence."""
    sequence = None if reset is None else reset.cumsum(1)
    final = None if sequence is None else sequence[:, -1]
    if tokens.mask is None:
        return _read(state, tokens, sequence, final, training)
    order, back = unmasked_first(tokens.mask)
    compact = tokens.map(lambda x: rows(x, order))
    sequence = None if sequence is None else rows(sequence, order)
    read, state, losses = _read(state, compact, sequence, final, training)
    return Read(*(rows(x, back) for x in read)), state, losses


def _where(condition: Tensor, x: Tensor, y: Tensor | float) -> Tensor:
    """:func:`torch.where` with a condition on the leading dimensions."""
    return torch.where(condition.view(*condition.shape, *(1,) * (x.dim() - condition.dim())), x, y)


class _Layout:
    """Where the ``T`` tokens of a call stand: ``[M, T]`` each, the first ``count`` of them real (``valid``).

    Attributes:
        valid, sequence: given, as in :func:`_read` (no reset: 0).
        number: of its chunk, in its sequence.
        offset: in its chunk.
        chunk: the coordinate at which its chunk starts.
        complete: its chunk ends in this call.
        before_complete: ``[M]``, the chunk that was open ends in this call.
        n_cells, size: ``S`` cells of ``size`` places.
    """

    def __init__(self, state: MemoryState, count: Tensor, length: int, sequence: Tensor | None) -> None:
        chunk_size, kept = state.config.chunk_size, state.config.chunk_size - 1
        already, device = state.per_memory(state.open_tokens).unsqueeze(1), count.device
        index = torch.arange(length, device=device)
        coordinate = already + index
        self.valid = index < count.unsqueeze(1)
        start = torch.zeros_like(coordinate)
        self.sequence = start if sequence is None else sequence
        if sequence is not None:
            previous = torch.cat((start[:, :1], sequence[:, :-1]), 1)
            start = torch.where(sequence > previous, coordinate, 0).cummax(1).values
        number = (coordinate - start) // chunk_size
        self.chunk = start + number * chunk_size
        self.number = number + torch.where(self.sequence == 0, state.per_memory(state.commits).unsqueeze(1), 0)
        self.offset = coordinate - self.chunk
        end = self.chunk + kept - already  # the token that is the last of a full chunk
        found = end.clamp(0, length - 1)
        same = rows(self.valid, found) & (rows(self.chunk, found) == self.chunk)
        self.complete = self.valid & (end < length) & same
        ends = self.valid & (coordinate == kept) & (self.chunk == 0) & (self.sequence == 0) & (already > 0)
        self.before_complete = ends.any(1)

        self.n_cells = 1 + (kept + length - 1) // chunk_size
        self.size = 1 if self.n_cells == 1 else chunk_size if sequence is None else 2 * chunk_size - 1
        cell = self.chunk // chunk_size
        place = coordinate - cell * chunk_size if self.n_cells > 1 else torch.zeros_like(cell)
        memory = torch.arange(state.memories, device=device).unsqueeze(1)
        self._places = state.memories * self.n_cells * self.size
        position = (memory * self.n_cells + (cell if self.n_cells > 1 else 0)) * self.size + place
        self._position = torch.where(self.valid, position, self._places)
        # The open chunk's tokens, the last of a row of C - 1, are the first in cell 0.
        back = torch.arange(-kept, 0, device=device) + already
        shown = (back >= 0) & (self.n_cells > 1)
        self._before = torch.where(shown, memory * self.n_cells * self.size + back, self._places)

    def spread(self, tokens: Tensor, before: Tensor | float | None = None, fill: float = 0) -> Tensor:
        """``[M, T, ...]`` -> ``[M, S, size, ...]``, with what the open chunk's tokens have (``[M, C - 1, ...]``)."""
        cells = tokens.new_full((self._places + 1, *tokens.shape[2:]), fill)
        cells = cells.index_put((self._position,), tokens)
        if before is not None:
            if not isinstance(before, Tensor):
                before = tokens.new_full((*self._before.shape, *tokens.shape[2:]), before)
            cells = cells.index_put((self._before,), before)
        return cells[:-1].unflatten(0, (-1, self.n_cells, self.size))

    def collect(self, cells: Tensor) -> Tensor:
        """``[M, S, size, ...]`` -> ``[M, T, ...]``, 0 where not ``valid``."""
        found = cells.flatten(0, 2)[self._position.clamp_max(self._places - 1)]
        return _where(self.valid, found, 0)


class _Before(NamedTuple):
    """The open chunk's tokens, the last of ``[M, C - 1, ...]``, and its last ``L`` tokens; zeros before them."""

    slots: Tensor
    coefficients: Tensor
    residuals: Tensor  # of the records: those of the tokens L before
    sub_scores: Tensor
    sub_slots: Tensor
    queries: Tensor | None
    mask: Tensor
    waiting: Tensor  # [M, L, Dv]
    waiting_gates: Tensor  # [M, L]

    @classmethod
    def of(cls, state: MemoryState, tokens: Tokens) -> _Before:
        memories, kept, lookahead = state.memories, state.config.chunk_size - 1, state.config.lookahead
        (heads, topk), width = (state.keys.shape[1], state.config.topk), state.values.shape[1]

        def zeros(*shape: int, dtype: torch.dtype = tokens.target.dtype) -> Tensor:
            return tokens.target.new_zeros(memories, *shape, dtype=dtype)

        if state.log is None:
            slots, fanout = zeros(kept, heads * topk, dtype=torch.int64), (kept, heads * topk)
            records, gates = [slots, zeros(*fanout), zeros(kept, width)], zeros(lookahead)
        else:
            records, gates = state.last_records(kept)[:3], state.last_records(lookahead)[4]
        if state.open is None:
            shape = (kept, heads, 2, topk)
            window = [zeros(*shape), zeros(*shape, dtype=torch.int64), zeros(kept, *tokens.query.shape[2:])]
        else:
            window = state.open.columns()
        waiting = zeros(lookahead, width) if state.waiting is None else state.waiting
        queries = window[2] if len(window) == 3 else None
        slots, coefficients, residuals = records
        return cls(
            slots=slots,
            coefficients=coefficients,
            residuals=residuals.to(tokens.target.dtype),
            sub_scores=window[0],
            sub_slots=window[1],
            queries=queries,
            mask=state.open_mask(),
            waiting=waiting,
            waiting_gates=gates,
        )


def _read(
    state: MemoryState, tokens: Tokens, sequence: Tensor | None, final: Tensor | None, training: bool
) -> tuple[Read, MemoryState, ChunkLosses]:
    """Read tokens of which the unmasked ones come first.

    ``sequence [M, T]``: resets up to each token; ``final [M]``: resets in the whole call; None without any.
    """
    state, config = state.indexed(tokens.query), state.config
    if keys_commit(config, training):  # several operators take the query: its gradient is to be rounded once, as a sum
        tokens = tokens._replace(query=tokens.query.to(state.keys.dtype))
    length = tokens.gate.shape[1]
    lookahead = config.lookahead
    count = state.per_memory(length) if tokens.mask is None else tokens.mask.sum(1)
    layout, before = _Layout(state, count, length, sequence), _Before.of(state, tokens)
    check_kept_queries(state, keys_commit(config, training), training)
    cut = _cut(state, layout)
    address = _address(state, tokens, layout, before, cut, final, training)
    slots, weights = address.slots, _where(layout.valid, read_weights(address.scores, config), 0)
    coefficients = write_coefficients(weights, config)

    # What the open chunk's tokens write: the residuals of its records, and of those that have their target now.
    has_source = layout.valid & (layout.offset >= lookahead)
    first = min(lookahead, length)
    arrived = before.waiting_gates[:, :first].unsqueeze(-1) * (tokens.target[:, :first] - before.waiting[:, :first])
    arrived = pad(_where(has_source[:, :first], arrived, 0), (0, 0, 0, lookahead - first))
    written = torch.cat((before.residuals, arrived), 1)[:, lookahead:]

    def ahead(x: Tensor) -> Tensor:
        """Of the token ``L`` places later."""
        return torch.cat((x[:, lookahead:], torch.zeros_like(x[:, :lookahead])), 1)

    stores = layout.valid & ahead(layout.valid) & (ahead(layout.chunk) == layout.chunk)
    cells = _Cells(
        layout.spread(slots, before.slots),
        layout.spread(weights, 0),
        layout.spread(coefficients, before.coefficients),
        layout.spread(ahead(tokens.target), written),
        layout.spread(_where(stores, tokens.gate, 0), 1),
        layout.spread(layout.sequence, 0),
        layout.spread(layout.chunk, 0, fill=-1),
    )
    output = layout.collect(_scan(state, cells, cut, residual_dtype(config, training), sequence is not None))

    reads, gates = torch.cat((before.waiting, output), 1), torch.cat((before.waiting_gates, tokens.gate), 1)
    residuals = gates[:, :length].unsqueeze(-1) * (tokens.target - reads[:, :length])
    records = [slots, coefficients, _where(has_source, residuals, 0), layout.number, tokens.gate]
    added = count
    if sequence is not None and final is not None:
        begin = (layout.valid & (sequence < final.unsqueeze(1))).sum(1)
        added = count - begin
        index = (begin.unsqueeze(1) + torch.arange(length, device=count.device)).clamp_max(length - 1)
        state, records = _restart(state, final > 0), [rows(x, index) for x in records]
    state = state.record(records, training)

    window = [(before.sub_scores, address.sub_scores), (before.sub_slots, address.sub_slots)]
    if before.queries is not None and keys_commit(config, training):
        window.append((before.queries, tokens.query))
    whole = (state.open_tokens + added) // config.chunk_size
    state = dataclasses.replace(
        state,
        keys=address.keys,
        open=Appendable.of([last(*pair, count) for pair in window]),
        waiting=last(before.waiting, output, count),
        position=state.position + added,
        commits=state.commits + whole,
        committed=state.committed + whole * config.chunk_size,
    )
    if config.detach_every and state.log is not None:
        bound = state.per_memory(state.commits) // config.detach_every * config.detach_every
        state = dataclasses.replace(state, log=state.log.detach_before(bound))
    return Read(output, _where(layout.valid, slots, 0), weights), state, address.losses


def _restart(state: MemoryState, which: Tensor) -> MemoryState:
    """The state with nothing read in the memories ``which [M]``."""
    counts: dict[str, Any] = {name: torch.where(which, 0, state.per_memory(getattr(state, name))) for name in COUNTS}
    log, own = state.log, state.own_values
    if log is not None:  # their records will be written over
        index = None if log.index is None else log.index.without(which)
        log = dataclasses.replace(log, records=log.records.unshared(), index=index)
    if own is not None:
        by_memory = own.unflatten(0, (state.memories, -1))
        own = _where(which, state.base.values.expand_as(by_memory), by_memory).flatten(0, 1)
    return dataclasses.replace(state, log=log, own_values=own, **counts)


def _cut(state: MemoryState, layout: _Layout) -> Tensor | None:
    """``detach_every`` as :func:`memory_scan` takes it."""
    every = state.config.detach_every
    if not every:
        return None
    flagged = (layout.number % every == 0) & (layout.number > 0) & layout.valid
    cut = layout.spread(torch.where(flagged, layout.sequence, -1), fill=-1).amax(2)
    cut[:, 0] = torch.where(state.per_memory(state.commits) >= every, 0, -1)
    return cut


class _Cells(NamedTuple):
    """What a scan takes, ``[M, S, size, ...]``; places without a token have weights, coefficients and gates 0."""

    slots: Tensor
    weights: Tensor
    coefficients: Tensor
    targets: Tensor
    gates: Tensor
    sequences: Tensor
    chunk: Tensor  # -1 without a token


def _scan(state: MemoryState, cells: _Cells, cut: Tensor | None, dtype: torch.dtype | None, resets: bool) -> Tensor:
    slots, weights, coefficients, targets, gates, sequences, chunk = cells
    memory = torch.arange(state.memories, device=slots.device).view(-1, 1, 1)
    counts = reads_of_slot(slots, (chunk + 1) * state.memories + memory, state.n_slots)
    written = (weights, coefficients / counts, targets, gates)
    numbers, log = sequences if resets else None, state.committed_log()
    output = memory_scan(state.values, state.own_slots(slots), *written, log, numbers, cut, dtype)
    if resets and state.own_values is not None:  # sequences that start here start from the base
        fresh = memory_scan(state.base.values, slots, *written, None, numbers, cut, dtype)
        output = _where(sequences > 0, fresh, output)
    return output


class _Address(NamedTuple):
    """Where the tokens of a call read, and what that does to keys."""

    scores: Tensor  # [M, T, H, k]
    slots: Tensor  # [M, T, K]
    sub_scores: Tensor  # [M, T, H, 2, k] that the addressing loss is taken of
    sub_slots: Tensor
    keys: Tensor
    losses: ChunkLosses


def _address(
    state: MemoryState,
    tokens: Tokens,
    layout: _Layout,
    before: _Before,
    cut: Tensor | None,
    final: Tensor | None,
    training: bool,
) -> _Address:
    config, keys = state.config, state.keys
    complete = layout.spread(layout.complete)
    before_mask = before.mask & layout.before_complete.unsqueeze(1)
    if config.key_update == "slow" or not (keys_commit(config, training) or cut is not None or final is not None):
        arguments = (config.topk, config.score, config.score_eps)
        found = product_key_address(tokens.query, keys, *arguments, sub_scores_reach_query=False)
        scores, slots, sub_scores, sub_slots = found
        if config.key_update != "slow":
            sub_scores = sub_scores.detach()
    else:
        cells, keys = _address_in_turn(state, tokens.query, layout, before, before_mask, complete, cut, final, training)
        scores, slots, sub_scores, sub_slots = (layout.collect(x) for x in cells)
        if final is not None:  # a sequence that started here, and is in its first chunk
            tokens_of_last = (layout.valid & (layout.sequence == final.unsqueeze(1))).sum(1)
            keys = _where((final > 0) & (tokens_of_last < config.chunk_size), state.base.all_keys, keys)

    n = keys.shape[3]
    usage = subkey_usage(
        layout.spread(sub_scores).flatten(0, 1), layout.spread(sub_slots).flatten(0, 1), complete.flatten(0, 1), n
    ).unflatten(0, complete.shape[:2])
    usage = torch.cat(
        ((usage[:, 0] + subkey_usage(before.sub_scores, before.sub_slots, before_mask, n)).unsqueeze(1), usage[:, 1:]),
        1,
    )
    losses = addressing_loss(usage, config.chunk_size * keys.shape[1])
    return _Address(scores, slots.flatten(-2), sub_scores, sub_slots, keys, ChunkLosses.of(losses, complete.any(2)))


def _address_in_turn(
    state: MemoryState,
    query: Tensor,
    layout: _Layout,
    before: _Before,
    before_mask: Tensor,
    complete: Tensor,
    cut: Tensor | None,
    final: Tensor | None,
    training: bool,
) -> tuple[list[Tensor], Tensor]:
    """What :func:`product_key_address` gives for each place, and the keys at the end, where keys move on the way.

    A cell's tokens go on from the cell before, or are in the first chunk of a sequence, which has the starting keys.
    """
    config, keys, base = state.config, state.keys, state.base.all_keys
    rate = config.learning_rate * config.addressing_weight
    in_first_chunk = layout.spread((layout.sequence > 0) & (layout.number == 0))
    steps = []
    cells = (x.unbind(1) for x in (layout.spread(query), in_first_chunk, complete))
    for s, (cell, fresh, ends) in enumerate(zip(*cells, strict=True)):
        if cut is not None and config.detach_every:
            number = state.per_memory(state.commits)
            due = cut[:, s] >= 0 if s else (number > 0) & (number % config.detach_every == 0)
            keys = _where(due, keys.detach(), keys)
        found: tuple[Tensor, ...] = product_key_address(cell, keys, config.topk, config.score, config.score_eps)
        if final is not None:
            anew = product_key_address(cell, base, config.topk, config.score, config.score_eps)
            found = tuple(_where(fresh, *pair) for pair in zip(anew, found, strict=True))
            keys = _where((fresh & ends).any(1), base, keys)
        steps.append(found)
        if keys_commit(config, training):
            chunk: tuple[Tensor, ...] = (cell, found[2], found[3])
            if s == 0 and before.queries is not None:
                kept = (before.queries, before.sub_scores, before.sub_slots)
                chunk = tuple(torch.cat(pair, 1) for pair in zip(kept, chunk, strict=True))
                ends = torch.cat((before_mask, ends), 1)
            keys = key_commit(chunk[0], keys, chunk[1], chunk[2], ends, rate, config.score)
    return [torch.stack(x, 1) for x in zip(*steps, strict=True)], keys
