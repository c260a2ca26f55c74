"""Taking records back out of a memory."""

from __future__ import annotations

import dataclasses

import torch

from fwpkm.checks import require
from fwpkm.memory.appendable import Appendable
from fwpkm.memory.state import MemoryState, number
from fwpkm.memory.write_log import WriteLog


def forget(state: MemoryState, first: int, last: int) -> MemoryState:
    """The state (``M = 1``, no chunk open) without records ``first`` to ``last - 1``, which have to be whole chunks.

    What remains are exactly the other records: the values are the base and what those write, chunk by chunk. Later
    residuals were measured against a memory that held what is gone, and stay as they are. With nothing after ``last``
    this is the state before record ``first``, bit for bit.

    Raises:
        ValueError: if keys have moved with the chunks (``key_update="fast"``), which the log does not tell, or the
            records are not whole chunks in the log.
    """
    require(state.memories == 1, "memories", state.memories, "1: records are taken out of one memory")
    kind = state.config.key_update
    require(kind != "fast", "key_update", repr(kind), "a memory whose keys stay: moves of the keys are not in the log")
    require(not state.ragged and state.open is None, "state", "in an open chunk", "one that was flushed")
    committed = number(state.committed)
    require(0 <= first <= last <= committed, "records", [first, last], "a range in the log's {}", committed)
    if first == last:
        return state
    assert state.log is not None
    slots, coefficients, residuals, chunks, gates = (x[:, :committed] for x in state.log.records.tensors)
    for edge in (first, last):
        inside = 0 < edge < committed and bool((chunks[:, edge - 1] == chunks[:, edge]).any())
        require(not inside, "records", [first, last], "whole chunks: one goes on across {}", edge)
    removed = int(chunks[0, last - 1] - chunks[0, first]) + 1
    later = torch.arange(committed, device=chunks.device) >= last
    fields = slots, coefficients, residuals, chunks - removed * later, gates
    left = [torch.cat((x[:, :first], x[:, last:]), 1) for x in fields]
    return dataclasses.replace(
        state,
        log=WriteLog(Appendable.of(left), state.log.lookahead) if left[0].shape[1] else None,
        position=state.position - (last - first),
        origin=state.origin - (last - first),
        commits=state.commits - removed,
        committed=committed - (last - first),
    )
