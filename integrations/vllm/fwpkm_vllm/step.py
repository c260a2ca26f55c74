"""A memory layer on the tokens of many requests at once, whose records live in pages. Nothing here knows vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm.layers.fwpkm import FwPKM, zscore
from fwpkm.layers.weights import at_least_float32
from fwpkm.memory import MemoryConfig
from fwpkm.memory.formulas import read_weights, relative_write_scale, write_coefficients
from fwpkm.ops import PagedLog, log_read, product_key_address
from fwpkm_vllm.folded import Folded
from fwpkm_vllm.keys import MovingKeys
from fwpkm_vllm.paged import Pages


@dataclass(frozen=True)
class Batch:
    """Where the ``T`` tokens of a step stand: pieces of ``R`` requests, one after the other.

    Attributes:
        starts: ``[R + 1]``, where the piece of each request begins; tokens from the last on are padding.
        requests: ``[T]``, the request of each token; -1 for padding.
        positions: ``[T]`` in their requests.
        computed: ``[R]``, tokens of each request before its piece.
        longest: the length of the longest piece.
        origins: ``[R]``, where a request's memory commits early, and chunks count from; 0 for nowhere. None for no
            request.
    """

    starts: Tensor
    requests: Tensor
    positions: Tensor
    computed: Tensor
    longest: int
    origins: Tensor | None = None

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, tokens: int, longest: int, origins: Tensor | None = None) -> Batch:
        """From ``starts [R + 1]`` and ``lengths [R]`` of the requests with these pieces, without waiting for a GPU."""
        starts = starts.long()
        index = torch.arange(tokens, device=starts.device)
        requests = torch.searchsorted(starts[1:], index, right=True)
        pieces = starts[1:] - starts[:-1]
        computed = (lengths - pieces).long()
        padding = requests == pieces.shape[0]
        requests = requests.masked_fill(padding, 0)
        positions = (computed[requests] + index - starts[requests]).masked_fill(padding, 0)
        return cls(starts, requests.masked_fill(padding, -1), positions, computed, longest, origins)

    @property
    def owners(self) -> Tensor:
        """``[T]`` request numbers that can be used as an index, also of padding."""
        return self.requests.clamp_min(0)

    def chunks(self, chunk_size: int, positions: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
        """The number of the chunk at ``positions`` of ``requests``, and where it starts."""
        number = positions // chunk_size
        if self.origins is None:
            return number, number * chunk_size
        origin = self.origins[requests]
        after = positions - origin
        since = after // chunk_size
        later = (origin > 0) & (after >= 0)
        number = torch.where(later, -(-origin // chunk_size) + since, number)
        return number, torch.where(later, origin + since * chunk_size, number * chunk_size)

    def rounds(self, chunk_size: int) -> int:
        """At most how many chunks a piece touches; it does not depend on what is on the device."""
        return 1 + -(-(self.longest - 1) // chunk_size) + (self.origins is not None and self.longest > 1)


@dataclass(frozen=True)
class Step:
    """What a memory layer needs to know of a step."""

    batch: Batch
    log: Pages
    recent: Pages
    folded: Folded | None = None
    keys: MovingKeys | None = None


def serve(memory: FwPKM, hidden: Tensor, step: Step) -> Tensor:
    """``memory`` on ``hidden [T, D]``: reads, and writes the records of these tokens.

    What a token gets is a function of the records of its own request before it, and equals what
    :meth:`fwpkm.layers.FwPKM.forward` gives for that request alone.
    """
    query_input, gate_input = _inputs(memory, hidden, step)
    # A token that is no number finds nothing, and stops nobody else's.
    query = torch.nan_to_num(memory.query(query_input), 0.0, 0.0, 0.0).unflatten(-1, (memory.heads, -1))
    target = zscore(memory.value(memory.value_norm(hidden)))
    gate = at_least_float32(memory.gate(gate_input)).sigmoid()
    read = read_and_write(memory.keys, memory.values, memory.config, query, target, gate, step)
    mixed = gate * read + (1 - gate) * target
    return hidden + memory.output(memory.output_norm(mixed.to(hidden.dtype)))


def _inputs(memory: FwPKM, hidden: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """The inputs of the query and of the gate, ``[T, D]``."""
    batch, recent = step.batch, step.recent
    if memory.query_conv is None or memory.gate_conv is None:
        return memory.query_norm(hidden), memory.gate_norm(hidden)
    reach, requests = memory.query_conv.width - 1, batch.computed.shape[0]
    if reach:
        recent.write("inputs", hidden)
    number = torch.arange(requests, device=hidden.device).unsqueeze(1)
    before = torch.arange(-reach, 0, device=hidden.device)
    back = batch.computed.unsqueeze(1) + before
    # All pieces in one row, each behind the inputs that came before it.
    row = hidden.new_zeros(hidden.shape[0] + requests * reach, hidden.shape[1])
    owner = torch.where(batch.requests < 0, requests - 1, batch.requests)
    place = torch.arange(hidden.shape[0], device=hidden.device) + (owner + 1) * reach
    row.index_put_((place,), hidden)
    if reach:
        past = torch.where((back >= 0).unsqueeze(-1), recent.read("inputs", number, back), 0)
        row.index_put_((batch.starts[:-1].unsqueeze(1) + (number + 1) * reach + before,), past)
    query_row, gate_row = memory.query_norm(row).unsqueeze(0), memory.gate_norm(row).unsqueeze(0)
    return memory.query_conv(query_row)[0, place], memory.gate_conv(gate_row)[0, place]


def read_and_write(
    keys: Tensor, values: Tensor, config: MemoryConfig, query: Tensor, target: Tensor, gate: Tensor, step: Step
) -> Tensor:
    """Section 2 of docs/design.md for the tokens of a step.

    Args:
        keys: ``[H, 2, n, Dk/2]``, what every request starts from; not changed.
        values: ``[N, Dv]``, what every request starts from; not changed.
        config: how the memories read and write.
        query: ``[T, H, Dk]``.
        target: ``[T, Dv]``.
        gate: ``[T, 1]``.
        step: where the tokens stand, and their records, which are written.

    Returns:
        The reads, ``[T, Dv]``; 0 for padding.
    """
    batch, log, recent = step.batch, step.log, step.recent
    if step.keys is None:  # they are everybody's
        found = product_key_address(query.unsqueeze(0), keys.unsqueeze(0), config.topk, config.score, config.score_eps)
        scores, slots = found[0][0], found[1][0]
    else:
        scores, slots = step.keys.address(query, keys, config)
    slots, weights = slots.flatten(1), read_weights(scores.unsqueeze(0), config)[0]
    number, start = batch.chunks(config.chunk_size, batch.positions, batch.owners)
    log.write("slots", slots)
    log.write("coefficients", _coefficients(weights, start, config, batch))
    recent.write("gates", gate)

    # Addresses do not depend on values: only what is read does, chunk after chunk of a piece.
    everyone = torch.arange(batch.computed.shape[0], device=query.device)
    first, _ = batch.chunks(config.chunk_size, batch.computed, everyone)
    round_of = number - first[batch.owners]
    source = batch.positions - config.lookahead
    stores = (source >= start).unsqueeze(1)
    fields = log.fields
    paged = PagedLog(fields["slots"], fields["coefficients"], fields["residuals"])
    reads = torch.zeros_like(target)
    for made in range(1 if step.folded is None or not step.folded.due else 2):
        table, committed, older, mine = log.table, start, None, batch.requests >= 0
        if step.folded is not None:
            # What was folded when a token's chunk began, though this step may have begun before: whatever the steps
            # are, a token reads from the same rows and the same records. A step completes one stretch at most.
            if made:
                for request, version in step.folded.due:
                    _fold(step.folded, request, version, log, len(values), config)
            before = step.folded.version(batch.computed) + made
            mine &= step.folded.version(start) == before[batch.owners]
            older = step.folded.read(slots, weights, batch.owners, torch.where(mine, before[batch.owners], 0))
            covered = before * step.folded.stretch
            page = paged.slots.shape[1]
            table = log.from_blocks(covered // page, -(-(step.folded.stretch + batch.longest) // page))
            committed = start - covered[batch.owners]
        for i in range(batch.rounds(config.chunk_size)):
            here = (round_of == i) & mine
            requests = torch.where(here, batch.requests, -1)
            read = log_read(
                values,
                slots,
                weights,
                paged,
                table,
                requests,
                committed,
                config.chunk_size,
                config.lookahead,
                batch.origins,
            )
            read = read if older is None else read + older
            reads = torch.where(here.unsqueeze(1), read, reads)
            recent.write("reads", read, here)
            before_it, its_gate = (recent.read(name, batch.owners, source) for name in ("reads", "gates"))
            log.write("residuals", torch.where(stores, its_gate * (target - before_it), 0), here)
    return reads


def _fold(folded: Folded, request: int, version: int, log: Pages, n_slots: int, config: MemoryConfig) -> None:
    """Make a request's rows of a version, from the log."""
    records = torch.arange((version - 1) * folded.stretch, version * folded.stretch, device=log.table.device)
    owner = torch.full_like(records, request)
    slots, coefficients, residuals = (log.read(name, owner, records) for name in ("slots", "coefficients", "residuals"))
    folded.make(request, version, slots, coefficients, residuals, n_slots, config)


def _coefficients(weights: Tensor, start: Tensor, config: MemoryConfig, batch: Batch) -> Tensor:
    """What the tokens' residuals are multiplied with, but for ``1 / N_s``; chunks ``start [T]`` there."""
    coefficients = write_coefficients(weights, config)
    if batch.origins is None:
        return coefficients
    left = batch.origins[batch.owners] - start  # of a chunk that is cut short
    length = torch.where((left > 0) & (left < config.chunk_size), left, config.chunk_size)
    return coefficients * relative_write_scale(config, length).to(coefficients.dtype).unsqueeze(1)
