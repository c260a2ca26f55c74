"""``fast_weight_memory``: section 2 of docs/design.md over the operators, with a state that continues."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fwpkm.checks import require, require_dtype, require_shape
from fwpkm.functional.columns import read_columns
from fwpkm.functional.ragged import read_ragged
from fwpkm.functional.tokens import ChunkLosses, Read, Tokens
from fwpkm.memory.config import MemoryConfig
from fwpkm.memory.fast_weights import FastWeights
from fwpkm.memory.formulas import addressing_loss, subkey_usage
from fwpkm.memory.state import MemoryState
from fwpkm.memory.trail import Trail, leaves_trail, parts
from fwpkm.ops.autocast import without_autocast


class MemoryResult(NamedTuple):
    """What :func:`fast_weight_memory` returns."""

    output: Tensor  # [B, T, Dv] the reads; 0 at masked tokens
    state: MemoryState  # continue here
    slots: Tensor  # [B, T, H * k] int64; 0 at masked tokens
    weights: Tensor  # [B, T, H * k]; 0 at masked tokens
    addressing_loss: Tensor  # scalar, mean L_addr of the chunks that this call committed (0 if none)


def fast_weight_memory(
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    memory: FastWeights | MemoryState,
    config: MemoryConfig,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    commit_partial: bool = False,
    training: bool = False,
) -> MemoryResult:
    """Read and write a memory along a sequence, chunk by chunk (paper, section 3; docs/design.md, section 2).

    Everything is computed in the dtype of the fast weights, also under autocast; queries in bfloat16 or float16 are
    converted where they are loaded, other inputs before. However a sequence is cut into calls, it gives the same
    outputs and the same memory.

    Args:
        query: ``[B, T, H, Dk]``, any floating dtype.
        target: ``[B, T, Dv]``; token ``t`` stores ``target[t + L]``.
        gate: ``[B, T]`` in [0, 1], how much of its residual a token stores.
        memory: :class:`FastWeights` to start from, or the ``state`` of an earlier call to continue.
        config: a :class:`MemoryConfig`; the one of the state, when continuing.
        mask: ``[B, T]`` bool, True for tokens; None for all. In the ``sequence`` scope a masked position is as good as
            removed. In the ``shared`` scope it stays a part of its column, but neither reads nor writes.
        reset: ``[B, T]`` bool, True where a new sequence starts, from the starting point; None for nowhere. Only in
            the ``sequence`` scope.
        commit_partial: end the call with a chunk boundary.
        training: whether keys commit with ``key_update="train_only"``; residuals are then not rounded to
            ``log_dtype``.

    Returns:
        A :class:`MemoryResult`. Gradients flow from ``output`` to ``query``, ``target``, ``gate``, across commits and
        calls, and to the keys and values that the memory started from when they require one; from ``addressing_loss``
        to the keys only, and only with ``key_update="slow"``.

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """
    require_shape("query", query, ("B", "T", "H", "Dk"))
    state = memory.usable() if isinstance(memory, MemoryState) else MemoryState.start(memory, config, query.shape[0])
    _check(query, target, gate, state, config, mask, reset)
    given = query, target, gate, mask, reset
    reads, losses = [], ChunkLosses.none(state.values)
    recorded = leaves_trail(training)
    for part in parts(given) if recorded else [given]:
        before = dataclasses.replace(state, trail=None)
        trail = (state.trail or Trail(read_again)).extend(before, part) if recorded else None
        read, state, found = _read(before, part, training)
        state, losses = dataclasses.replace(state.folded(), trail=trail), losses + found  # a trail keeps no long log
        reads.append(read)
    read = reads[0] if len(reads) == 1 else Read(*(torch.cat(x, 1) for x in zip(*reads, strict=True)))
    if commit_partial:
        losses = losses + _open_loss(state)
        state = state.flush()
    loss = losses.mean() if config.key_update == "slow" else losses.mean().detach()
    return MemoryResult(read.output, state.folded(), read.slots, read.weights, loss)


def read_again(state: MemoryState, given: tuple[Tensor | None, ...]) -> MemoryState:
    """The state after reading what another state has read, outside training: queries, targets, gates, mask, reset."""
    return _read(state.usable(), given, training=False)[1].folded()


def _read(
    state: MemoryState, given: tuple[Tensor | None, ...], training: bool
) -> tuple[Read, MemoryState, ChunkLosses]:
    """Read and write: what the arguments of :func:`fast_weight_memory` give, which have been checked."""
    query, target, gate, mask, reset = given
    assert query is not None
    assert target is not None
    assert gate is not None
    shared = state.config.scope == "shared"
    with without_autocast(query):
        pattern = "b t ... -> 1 (t b) ..." if shared else "b t ... -> b t ..."
        target, gate = (x.to(state.values.dtype) for x in (target, gate))
        if query.dtype not in (torch.bfloat16, torch.float16):  # which operators take as they come
            query = query.to(state.values.dtype)
        if mask is not None:  # what stands at masked positions, NaN too, is nobody's
            query = torch.where(mask[..., None, None], query, 0)
            target, gate = torch.where(mask[..., None], target, 0), torch.where(mask, gate, 0)
        tokens = Tokens(query, target, gate, mask).map(lambda x: rearrange(x, pattern))
        if not shared and (mask is not None or reset is not None or state.ragged):
            read, state, losses = read_ragged(state.as_ragged(), tokens, reset, training)
        else:
            read, state, losses = read_columns(state, tokens, training)
    if shared:
        length = query.shape[1]
        read = Read(*(rearrange(x, "1 (t b) d -> b t d", t=length) for x in read))
    return read, state, losses


def _check(
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    state: MemoryState,
    config: MemoryConfig,
    mask: Tensor | None,
    reset: Tensor | None,
) -> None:
    batch, length = query.shape[:2]
    _, heads, _, n, half = state.keys.shape
    require(batch >= 1 and length >= 1, "query.shape[:2]", [batch, length], "at least one sequence and one token")
    require_shape("query", query, ("B", "T", heads, 2 * half))
    require_shape("target", target, (batch, length, state.base.values.shape[1]))
    require_shape("gate", gate, (batch, length))
    for name, tensor in (("query", query), ("target", target), ("gate", gate)):
        require(tensor.is_floating_point(), f"{name}.dtype", tensor.dtype, "a floating dtype")
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None:
            require_shape(name, flags, (batch, length))
            require_dtype(name, flags, torch.bool)
    require(reset is None or config.scope == "sequence", "reset", "given", "None in the 'shared' scope")
    require(config.topk <= n, "config.topk", config.topk, "at most n_subkeys ({})", n)
    require(config == state.config, "config", config, "the configuration of the state, {}", state.config)
    require(batch == state.batch, "query.shape[0]", batch, "{}, the batch of the state", state.batch)


def _open_loss(state: MemoryState) -> ChunkLosses:
    """The addressing loss of the open chunks."""
    if state.open is None or not state.has_open:
        return ChunkLosses.none(state.values)
    sub_scores, sub_slots = state.open.columns()[:2]
    mask = state.open_mask()
    usage = subkey_usage(sub_scores, sub_slots, mask, state.keys.shape[3])
    pairs = mask.sum(1).clamp_min(1) * state.keys.shape[1]
    return ChunkLosses.of(addressing_loss(usage, pairs.view(-1, 1, 1)), state.per_memory(state.open_tokens) > 0)
