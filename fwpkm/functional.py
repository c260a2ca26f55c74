"""``fast_weight_memory``: section 2 of docs/design.md over the operators, with a state that continues."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from fwpkm.checks import require, require_shape
from fwpkm.memory import FastWeights, MemoryConfig, MemoryState, OpenChunk, reads_of_slot
from fwpkm.ops import key_commit, memory_scan, product_key_address


class MemoryResult(NamedTuple):
    """What :func:`fast_weight_memory` returns."""

    output: Tensor  # [B, T, Dv] the reads
    state: MemoryState  # continue here
    slots: Tensor  # [B, T, H * k] int64
    weights: Tensor  # [B, T, H * k]
    addressing_loss: Tensor  # scalar, mean L_addr of the chunks that this call committed (0 if none)


class _Tokens(NamedTuple):
    """Tokens of ``M`` memories, ``[M, P, ...]``, in the order in which a memory sees them."""

    query: Tensor  # [M, P, H, Dk]
    target: Tensor  # [M, P, Dv]
    gate: Tensor  # [M, P]

    def slice(self, start: int, stop: int) -> _Tokens:
        return _Tokens(*(x[:, start:stop] for x in self))


class _Piece(NamedTuple):
    """The result of a run of tokens."""

    output: Tensor  # [M, P, Dv]
    slots: Tensor  # [M, P, K]
    weights: Tensor  # [M, P, K]


def fast_weight_memory(
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    memory: FastWeights | MemoryState,
    config: MemoryConfig,
    commit_partial: bool = False,
    training: bool = False,
) -> MemoryResult:
    """Read and write a memory along a sequence, chunk by chunk (paper, section 3; docs/design.md, section 2).

    Everything is computed in the dtype of the fast weights, also under autocast. However a sequence is cut into calls,
    it gives the same outputs and the same memory.

    Args:
        query: ``[B, T, H, Dk]``, any floating dtype.
        target: ``[B, T, Dv]``; token ``t`` stores ``target[t + L]``.
        gate: ``[B, T]`` in [0, 1], how much of its residual a token stores.
        memory: :class:`FastWeights` to start from, or the ``state`` of an earlier call to continue.
        config: a :class:`MemoryConfig`; the one of the state, when continuing.
        commit_partial: end the call with a chunk boundary.
        training: whether keys commit with ``key_update="train_only"``.

    Returns:
        A :class:`MemoryResult`. Gradients flow from ``output`` to ``query``, ``target``, ``gate``, across commits and
        calls, and to the keys and values that the memory started from when they require one; from ``addressing_loss``
        to the keys only, and only with ``key_update="slow"``.

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """
    require_shape("query", query, ("B", "T", "H", "Dk"))
    batch, length = query.shape[:2]
    state = memory if isinstance(memory, MemoryState) else MemoryState.start(memory, config, batch)
    _check(query, target, gate, state, config)
    dtype = state.values.dtype
    with torch.autocast(query.device.type, enabled=False):
        pattern = "b t ... -> 1 (t b) ..." if config.scope == "shared" else "b t ... -> b t ..."
        tokens = _Tokens(*(rearrange(x.to(dtype), pattern) for x in (query, target, gate)))
        state, pieces, losses = _advance(state, tokens, training)
        if commit_partial and state.open is not None:
            losses.append(_addressing_loss(state.open.sub_scores, state.open.sub_slots, state.keys.shape[3]))
            state = state.flush()
        output, slots, weights = (
            torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)
        )
        if config.scope == "shared":
            output, slots, weights = (rearrange(x, "1 (t b) d -> b t d", t=length) for x in (output, slots, weights))
        loss = torch.cat(losses).mean() if losses else output.new_zeros(())
    return MemoryResult(output, state, slots, weights, loss)


def _check(query: Tensor, target: Tensor, gate: Tensor, state: MemoryState, config: MemoryConfig) -> None:
    batch, length = query.shape[:2]
    _, heads, _, n, half = state.keys.shape
    require(batch >= 1 and length >= 1, "query.shape[:2]", [batch, length], "at least one sequence and one token")
    require_shape("query", query, ("B", "T", heads, 2 * half))
    require_shape("target", target, (batch, length, state.values.shape[1]))
    require_shape("gate", gate, (batch, length))
    for name, tensor in (("query", query), ("target", target), ("gate", gate)):
        require(tensor.is_floating_point(), f"{name}.dtype", tensor.dtype, "a floating dtype")
    require(config.topk <= n, "config.topk", config.topk, "at most n_subkeys ({})", n)
    require(config == state.config, "config", config, "the configuration of the state, {}", state.config)
    rows = state.columns if config.scope == "shared" else state.memories
    require(batch == rows, "query.shape[0]", batch, "{}, the batch of the state", rows)


def _advance(state: MemoryState, tokens: _Tokens, training: bool) -> tuple[MemoryState, list[_Piece], list[Tensor]]:
    """Cut the tokens at chunk boundaries: as many whole chunks as there are at once, the rest into the open chunk."""
    config, total = state.config, tokens.gate.shape[1]
    chunk = config.chunk_size * state.columns
    pieces, losses = [], []
    start = 0
    while start < total:
        if state.open is None and config.detach_every and state.commits and state.commits % config.detach_every == 0:
            # slow keys have no history to cut: they are parameters
            keys = state.keys if config.key_update == "slow" else state.keys.detach()
            state = dataclasses.replace(state.detach(), keys=keys)
        whole = (total - start) // chunk if state.open is None else 0
        if whole:
            if config.detach_every:
                whole = min(whole, config.detach_every - state.commits % config.detach_every)
            stop = start + whole * chunk
            state, piece, loss = _read_chunks(state, tokens.slice(start, stop), whole, training)
            losses.append(loss)
        else:
            missing = chunk - (state.open.tokens if state.open else 0)
            stop = min(start + missing, total)
            state, piece = _read_open(state, tokens.slice(start, stop), training)
            if state.open is not None and state.open.tokens == chunk:
                losses.append(_addressing_loss(state.open.sub_scores, state.open.sub_slots, state.keys.shape[3]))
                state = state.commit_open()
        pieces.append(piece)
        start = stop
    return state, pieces, losses


def _keys_commit(config: MemoryConfig, training: bool) -> bool:
    return config.key_update == "fast" or (config.key_update == "train_only" and training)


def _weights(scores: Tensor, config: MemoryConfig) -> Tensor:
    """Scores ``[M, P, H, k]`` -> weights ``[M, P, H * k]`` (2.3)."""
    scaled = scores.flatten(-2) / config.temperature
    if config.nonlinearity == "softmax":
        return scaled.softmax(-1)
    return scaled.relu() if config.nonlinearity == "relu" else torch.nn.functional.silu(scaled)


def _coefficients(weights: Tensor, config: MemoryConfig, heads: int) -> Tensor:
    """Learning rate, write scale and weight (2.6): what a token's residual is multiplied with, but for ``1 / N_s``."""
    length, lookahead = config.chunk_size, config.lookahead
    if length <= lookahead:
        return torch.zeros_like(weights)
    if config.write_scale == "reference":
        return weights * (config.learning_rate * heads * config.topk * length / (length - lookahead))
    if config.write_scale == "paper":
        return weights * config.learning_rate
    norm = weights.square().sum(-1, keepdim=True)
    empty = norm == 0
    return torch.where(empty, 0.0, weights * config.learning_rate / torch.where(empty, 1.0, norm))


def _addressing_loss(sub_scores: Tensor, sub_slots: Tensor, n: int) -> Tensor:
    """``L_addr`` (2.7) of each of ``M`` chunks, from the selected sub-scores ``[M, P, H, 2, k]``."""
    usage = sub_scores.new_zeros(sub_scores.shape[0], 2, n)
    index, used = (rearrange(x, "m p h c k -> m c (p h k)") for x in (sub_slots, sub_scores.softmax(-1)))
    usage = usage.scatter_add(-1, index, used) / (sub_scores.shape[1] * sub_scores.shape[2])
    return (usage * (usage + 1e-8).log()).sum((-1, -2))


def _loss_sub_scores(query: Tensor, keys: Tensor, sub_scores: Tensor, config: MemoryConfig, training: bool) -> Tensor:
    """The sub-scores that the addressing loss is taken of: it reaches ``slow`` keys, and never the queries."""
    if config.key_update == "slow" and training and torch.is_grad_enabled() and keys.requires_grad:
        return product_key_address(query.detach(), keys, config.topk, config.score, config.score_eps)[2]
    return sub_scores


def _read_open(state: MemoryState, tokens: _Tokens, training: bool) -> tuple[MemoryState, _Piece]:
    """Read tokens of the open chunk, and keep what its commit will need."""
    config, keys = state.config, state.keys
    address = product_key_address(tokens.query, keys, config.topk, config.score, config.score_eps)
    scores, slots, sub_scores, sub_slots = address
    slots, weights = slots.flatten(-2), _weights(scores, config)
    own_slots, tokens_of_chunk = state.own_slots(slots).unsqueeze(1), (weights, torch.zeros_like(weights), *tokens[1:])
    reads, no_write, targets, gates = (x.unsqueeze(1) for x in tokens_of_chunk)
    output = memory_scan(state.values, own_slots, reads, no_write, targets, gates, state.own_log()).squeeze(1)

    old = state.open
    waiting, gates = output, tokens.gate
    if old is not None:
        waiting, gates = torch.cat((old.waiting_reads, output), 1), torch.cat((old.waiting_gates, gates), 1)
    # The first of the waiting tokens gets the target that lies L tokens after it.
    lookahead = config.lookahead * state.columns
    waited = 0 if old is None else old.waiting_gates.shape[1]
    known = max(0, gates.shape[1] - lookahead)
    targets = tokens.target[:, lookahead - waited :][:, :known]
    residuals = gates[:, :known, None] * (targets - waiting[:, :known])
    keeps_queries = _keys_commit(config, training)
    new = OpenChunk(
        slots,
        _coefficients(weights, config, tokens.query.shape[2]),
        residuals,
        waiting[:, known:],
        gates[:, known:],
        _loss_sub_scores(tokens.query, keys, sub_scores, config, training),
        sub_slots,
        tokens.query if keeps_queries else None,
    )
    if old is not None:
        require(
            (old.queries is not None) == keeps_queries,
            "training",
            training,
            "the same for all tokens of a chunk when key_update is 'train_only' (flush() the state in between)",
        )
        joined = {
            name: torch.cat((getattr(old, name), getattr(new, name)), 1)
            for name in ("slots", "coefficients", "residuals", "sub_scores", "sub_slots")
        }
        queries = None if old.queries is None else torch.cat((old.queries, tokens.query), 1)
        new = new._replace(**joined, queries=queries)
    state = dataclasses.replace(state, open=new, position=state.position + output.shape[1] // state.columns)
    return state, _Piece(output, slots, weights)


def _read_chunks(
    state: MemoryState, tokens: _Tokens, n_chunks: int, training: bool
) -> tuple[MemoryState, _Piece, Tensor]:
    """Read and commit whole chunks."""
    config, keys = state.config, state.keys
    heads, n = keys.shape[1], keys.shape[3]
    chunked = _Tokens(*(rearrange(x, "m (s p) ... -> m s p ...", s=n_chunks) for x in tokens))
    if _keys_commit(config, training):
        steps, rate = [], config.learning_rate * config.addressing_weight
        for s in range(n_chunks):
            query = chunked.query[:, s]
            step = product_key_address(query, keys, config.topk, config.score, config.score_eps)
            keys = key_commit(query, keys, step[2], step[3], None, rate, config.score)
            steps.append(step)
        scores, slots, sub_scores, sub_slots = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        loss_scores = sub_scores
    else:
        address = product_key_address(tokens.query, keys, config.topk, config.score, config.score_eps)
        loss_scores = _loss_sub_scores(tokens.query, keys, address[2], config, training)
        scores, slots, loss_scores, sub_slots = (
            rearrange(x, "m (s p) ... -> m s p ...", s=n_chunks) for x in (*address[:2], loss_scores, address[3])
        )
    loss = _addressing_loss(loss_scores.flatten(0, 1), sub_slots.flatten(0, 1), n)

    slots, weights = slots.flatten(-2), _weights(scores.flatten(0, 1), config).unflatten(0, scores.shape[:2])
    coefficients = _coefficients(weights, config, heads)
    chunk_of_token = torch.arange(state.memories * n_chunks, device=slots.device).view(state.memories, n_chunks, 1)
    counts = reads_of_slot(slots, chunk_of_token.expand(slots.shape[:3]), state.n_slots)
    # Token t stores the target of token t + L. The last L tokens of a chunk have none: gate 0, residual 0.
    lookahead = min(config.lookahead * state.columns, chunked.gate.shape[2])
    has_target = chunked.gate.shape[2] - lookahead
    targets = pad(chunked.target[:, :, lookahead:], (0, 0, 0, lookahead))
    gates = pad(chunked.gate[:, :, :has_target], (0, lookahead))
    output = memory_scan(
        state.values, state.own_slots(slots), weights, coefficients / counts, targets, gates, state.own_log()
    )
    residuals = gates.unsqueeze(-1) * (targets - output)

    output, slots, weights, coefficients, residuals = (
        x.flatten(1, 2) for x in (output, slots, weights, coefficients, residuals)
    )
    state = state.append(slots, coefficients, residuals, n_chunks)
    position = state.position + n_chunks * config.chunk_size
    return dataclasses.replace(state, keys=keys, position=position), _Piece(output, slots, weights), loss
