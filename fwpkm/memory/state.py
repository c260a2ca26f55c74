"""The state of memories at work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fwpkm.checks import require, require_choice, require_shape
from fwpkm.memory.appendable import Appendable, is_transformed, normal, surely
from fwpkm.memory.changes import Changes
from fwpkm.memory.config import MemoryConfig
from fwpkm.memory.fast_weights import FastWeights
from fwpkm.memory.formulas import relative_write_scale, residual_dtype
from fwpkm.memory.log_index import can_index
from fwpkm.memory.packing import rows
from fwpkm.memory.trail import Trail, require_reach
from fwpkm.memory.write_log import WriteLog
from fwpkm.ops import IndexedLog, Log, key_commit, memory_write_


@dataclass(frozen=True)
class MemoryState:
    """``M`` memories that have read something; immutable, so that continuing it twice gives independent results.

    In the ``sequence`` scope memory ``m`` belongs to row ``m`` of the batch. In the ``shared`` scope there is one, a
    chunk is ``C`` columns of the batch, and its tokens are numbered column by column.

    Counts are integers while all memories are equally far, and tensors ``[M]`` once a mask or a reset has let them
    differ; the records of memory ``m`` are then the first ``filled[m]`` of its row, and what is kept of the open chunk
    stands at the end of a row of ``C - 1`` tokens.

    Attributes:
        config: how these memories read and write.
        base: the starting point, a reference.
        keys: ``[M or 1, H, 2, n, Dk/2]``, as they are now.
        own_values: the memories' own values ``[M * N, Dv]`` once their log had outgrown that, or None: the base's.
        log: the records since the start (or since they were folded into ``own_values``), or None.
        open: of the open chunk's tokens ``sub_scores, sub_slots [M, P, H, 2, k]`` and, if their keys will commit,
            ``queries [M, P, H, Dk]``, in the dtype of the keys; or None.
        waiting: ``[M, <= L, Dv]`` reads of the open chunk's last tokens, whose target is still to come.
        position: tokens (columns) of the current sequence read so far.
        origin: where chunk boundaries count from; 0 until the first early flush.
        commits: chunks of the current sequence committed so far.
        committed: records in the log of committed chunks.
        memories: ``M``.
        columns: rows of the batch that share a memory: 1, or ``B`` in the ``shared`` scope.
        keeps_log: never fold the log into dense values, however long it grows.
        trail: what was read lately, for :meth:`crop`; None if that is not known.
    """

    config: MemoryConfig
    base: FastWeights
    keys: Tensor
    own_values: Tensor | None = None
    log: WriteLog | None = None
    open: Appendable | None = None
    waiting: Tensor | None = None
    position: int | Tensor = 0
    origin: int | Tensor = 0
    commits: int | Tensor = 0
    committed: int | Tensor = 0
    memories: int = 1
    columns: int = 1
    keeps_log: bool = False
    trail: Trail | None = None

    @classmethod
    def start(cls, weights: FastWeights, config: MemoryConfig, batch: int) -> MemoryState:
        """The state of ``batch`` sequences that have read nothing."""
        memories, columns = (1, batch) if config.scope == "shared" else (batch, 1)
        keys = weights.all_keys
        require(keys.shape[0] in (1, memories), "keys.shape[0]", keys.shape[0], "1 or {}, the memories", memories)
        return cls(config, weights, keys, memories=memories, columns=columns)

    @property
    def batch(self) -> int:
        """Rows of the batch that this state belongs to."""
        return self.memories * self.columns

    @property
    def n_slots(self) -> int:
        return self.keys.shape[3] ** 2

    @property
    def values(self) -> Tensor:
        """What the log adds to: the base values ``[N, Dv]``, or the memories' own ``[M * N, Dv]``."""
        return self.base.values if self.own_values is None else self.own_values

    @property
    def open_tokens(self) -> int | Tensor:
        """Tokens (columns) of the open chunk."""
        return (self.position - self.origin) % self.config.chunk_size

    @property
    def has_open(self) -> bool:
        """Whether a chunk is open: a graph may have made one of no tokens."""
        return self.open is not None and not surely(self.open.used == 0)

    @property
    def filled(self) -> int | Tensor:
        """Records of each memory in the log."""
        return self.committed + self.open_tokens * self.columns

    @property
    def ragged(self) -> bool:
        """Whether the memories may be differently far."""
        return isinstance(self.position, Tensor)

    def own_slots(self, slots: Tensor) -> Tensor:
        """Slots ``[M, ...]`` as rows of :attr:`values`."""
        if self.own_values is None:
            return slots
        offset = torch.arange(self.memories, device=slots.device) * self.n_slots
        return slots + offset.view(-1, *(1,) * (slots.dim() - 1))

    def indexed(self, *inputs: Tensor) -> MemoryState:
        """The same state, to be read with ``inputs``: with an index of all it has committed, if that is cheaper.

        That is in a long log on the CPU, outside graphs.
        """
        log = self.log
        if log is None:
            return self
        recorded = torch.is_grad_enabled() and (log.coefficients.requires_grad or log.residuals.requires_grad)
        if log.slots[0].numel() < _INDEXED or recorded or not can_index(log.slots, *inputs):
            return self if log.index is None else dataclasses.replace(self, log=dataclasses.replace(log, index=None))
        return dataclasses.replace(self, log=log.indexed(self.per_memory(self.committed), self.n_slots))

    def committed_log(self) -> Log | IndexedLog | None:
        """The records that have taken effect, with slots as rows of :attr:`values`, of an :meth:`indexed` state."""
        if self.log is None:
            return None
        if self.log.index is not None:
            return IndexedLog(self.n_slots, self.log.residuals.detach(), self.log.index.levels)
        log = self.log.first(self.per_memory(self.committed))
        # a slot of -1 stays one
        return log if self.own_values is None else log._replace(slots=_where_read(log.slots, self.own_slots(log.slots)))

    def per_memory(self, count: int | Tensor) -> Tensor:
        """A count as a tensor ``[M]``."""
        if isinstance(count, Tensor):
            return count
        return torch.full((self.memories,), count, device=self.keys.device)

    # What users do with a state

    def fork(self) -> MemoryState:
        """A state with the same contents; whichever of the two goes on first, neither sees the other."""
        return dataclasses.replace(self)

    def detach(self) -> MemoryState:
        """The same state, cut from the graph that computed it.

        ``slow`` keys are parameters that no call has computed: gradients of what goes on from here reach them.
        """
        trail = self.trail and self.trail.map(MemoryState.detach, Tensor.detach)
        cut = dataclasses.replace(dataclasses.replace(self, trail=None).map(Tensor.detach), trail=trail)
        if self.config.key_update != "slow":
            return cut
        return dataclasses.replace(cut, base=FastWeights(self.base.keys, cut.base.values))._with_slow_keys()

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryState:
        """A fork: nobody changes a state, and its starting point stays a reference, as a gradient's way back does."""
        return self.fork()

    def flush(self) -> MemoryState:
        """Commit the open chunk now, with its own length as ``C``; chunk boundaries then count from here."""
        if self.open is None or not self.has_open:
            return self
        assert self.log is not None
        tokens = self.per_memory(self.open_tokens)
        keys = self.keys
        if len(self.open.tensors) == 3:
            sub_scores, sub_slots, queries = self.open.columns()
            mask = self.open_mask() if self.ragged or self.config.scope == "shared" else None
            rate = self.config.learning_rate * self.config.addressing_weight
            keys = key_commit(queries, keys, sub_scores, sub_slots, mask, rate, self.config.score)
        return dataclasses.replace(
            self,
            keys=keys,
            log=self.log.scale(self.per_memory(self.committed), relative_write_scale(self.config, tokens)),
            open=None,
            waiting=None,
            origin=self.position,
            commits=self.commits + _at_most_one(self.open_tokens),
            committed=self.filled,
            trail=self.trail and self.trail.flush(),
        )

    def fold(self) -> FastWeights:
        """The dense weights this state stands for (``M = 1``): what it has committed, so flush it first for the rest.

        Raises:
            ValueError: for a state of several memories.
        """
        require(self.memories == 1, "memories", self.memories, "1: a dense copy is made for one memory")
        state = self.map(Tensor.detach)
        return FastWeights(state.keys[0], state.dense_values())

    def dense_values(self, lengths: Tensor | None = None) -> Tensor:
        """The values of every memory as far as it has committed, ``[M * N, Dv]``: base plus log, a copy.

        With ``lengths [M]`` only the first so many of its records are added, which have to be of whole chunks.
        """
        values = self.values.repeat(self.memories, 1) if self.own_values is None else self.own_values.clone()
        if self.log is not None:
            lengths = self.per_memory(self.committed) if lengths is None else lengths
            memory_write_(values, *self.log.writes(lengths, self.n_slots))
        return values

    def changes(self) -> Changes:
        """What this state (``M = 1``) has committed, as changes of its starting point.

        Raises:
            ValueError: for a state of several memories.
        """
        require(self.memories == 1, "memories", self.memories, "1: a starting point is written by one memory")
        state = self.map(Tensor.detach)
        log = state.log
        writes = None if log is None else log.writes(state.per_memory(state.committed), state.n_slots)
        keys = None if self.config.key_update == "slow" else state.keys  # slow: a parameter, that no commit moves
        return Changes(writes, keys, state.own_values)

    def write_back(self) -> None:
        """Write what this state (``M = 1``) has committed into the starting point that it refers to, in place.

        Only the rows that were written to change, and keys if they have moved. Other states that started there are
        worth nothing afterwards.
        """
        self.changes().apply_(self.base)

    def select(self, indices: Tensor | Sequence[int]) -> MemoryState:
        """The memories ``indices`` (of the ``sequence`` scope; repeated ones as often as named), as a beam search does.

        Raises:
            ValueError: in the ``shared`` scope, or for an index out of range.
        """
        require_choice("config.scope", self.config.scope, ("sequence",))
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.keys.device)
        require_shape("indices", index, ("M",))
        if index.device.type == "cpu" and index.numel():
            low, high = (int(x) for x in index.aminmax())
            fits = low >= 0 and high < self.memories
            require(fits, "indices", index.tolist(), "memories in [0, {})", self.memories)

        def of(count: int | Tensor) -> int | Tensor:
            return count[index] if isinstance(count, Tensor) else count

        own = self.own_values
        return dataclasses.replace(
            self,
            keys=self.keys if self.keys.shape[0] == 1 else self.keys[index],
            base=self.base
            if self.base.all_keys.shape[0] == 1
            else FastWeights(self.base.keys[index], self.base.values),
            own_values=None if own is None else own.unflatten(0, (self.memories, -1))[index].flatten(0, 1),
            log=None if self.log is None else self.log.select(index),
            open=None if self.open is None else self.open.select(index),
            waiting=None if self.waiting is None else self.waiting[index],
            position=of(self.position),
            origin=of(self.origin),
            commits=of(self.commits),
            committed=of(self.committed),
            memories=index.numel(),
            trail=self.trail and self.trail.map(lambda state: state.select(index), lambda x: x[index]),
        )

    def crop(self, tokens: int) -> MemoryState:
        """The state without its last ``tokens`` tokens (columns of the calls, masked ones included).

        It is the state before them, whatever they have committed; a flush before the first of them stays.

        Raises:
            ValueError: for more than the last 128 tokens, or than were read with this state since it began or was
                loaded, outside training and compiled graphs.
        """
        require_reach(tokens, 0 if self.trail is None else self.trail.reach)
        if tokens == 0 or self.trail is None:
            return self
        state, trail = self.trail.back(tokens)
        return dataclasses.replace(state, trail=trail if trail.steps else None)

    def save(self, path: str | Path) -> None:
        """Write the state to a file: whole, or not at all. The base values are not in it."""
        from fwpkm.memory.state_file import save_state  # a file format is built on what it holds

        save_state(self, path)

    @staticmethod
    def load(path: str | Path, base: FastWeights) -> MemoryState:
        """Read a state that was saved, of memories that started from ``base``.

        Raises:
            ValueError: if the file is no state, is damaged, of another version, or of memories with another base.
        """
        from fwpkm.memory.state_file import load_state

        return load_state(path, base)

    # What reading builds new states with

    def usable(self) -> MemoryState:
        """The same state, wherever it was computed, for a call that may record gradients.

        ``slow`` keys are the starting point's, of which a call without gradients keeps a view without; and tensors
        that are bound to inference mode are copied outside of it.
        """
        if torch.is_grad_enabled():
            self = self._with_slow_keys()
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return self
        log, window = self.log, self.open
        index = None if log is None or log.index is None else log.index.covered
        first = log and log.slots, window and window.tensors[0]
        found = self.keys, self.base.values, self.own_values, self.waiting, self.position, index, *first
        bound = any(isinstance(x, Tensor) and x.is_inference() for x in found)
        return self.map(normal) if bound else self

    def map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        """The same state with ``change`` of each tensor, which leaves what it holds as it is."""
        own, waiting = (None if x is None else change(x) for x in (self.own_values, self.waiting))
        counts = {name: getattr(self, name) for name in COUNTS}
        return dataclasses.replace(
            self,
            base=FastWeights(change(self.base.keys), change(self.base.values)),
            keys=change(self.keys),
            own_values=own,
            log=None if self.log is None else self.log.map(change),
            open=None if self.open is None else self.open.map(change),
            waiting=waiting,
            trail=self.trail and self.trail.map(lambda state: state.map(change), change),
            **{name: change(count) for name, count in counts.items() if isinstance(count, Tensor)},  # type: ignore[arg-type]
        )

    def record(self, records: Sequence[Tensor], training: bool) -> MemoryState:
        """Add records, with the fields of :class:`fwpkm.memory.WriteLog`, to the log; the counts stay as they are.

        In a ragged state they stand from :attr:`filled` on, over whatever is there.
        """
        slots, coefficients, residuals, *others = records
        residuals = residuals.to(residual_dtype(self.config, training) or residuals.dtype)
        records = (slots, coefficients, residuals, *others)
        if self.log is None:
            log = WriteLog(Appendable.of(records), self.config.lookahead * self.columns)
        else:
            log = self.log.with_residuals_in(torch.promote_types(self.log.residuals.dtype, residuals.dtype))
            old = log.records
            appended = old.insert(records, self.filled) if isinstance(self.filled, Tensor) else old.append(records)
            log = dataclasses.replace(log, records=appended)
        return dataclasses.replace(self, log=log)

    def last_records(self, width: int) -> list[Tensor]:
        """The log's fields ``[M, width, ...]`` of each memory's last records: zeros before the open chunk's first."""
        assert self.log is not None
        records = self.log.records
        if not isinstance(self.filled, Tensor):
            return [x[:, self.filled - width : self.filled] for x in records.tensors]
        index = self.filled.unsqueeze(1) + torch.arange(-width, 0, device=self.keys.device)
        is_open = index >= self.per_memory(self.committed).unsqueeze(1)
        found = [rows(x, index.clamp_min(0)) for x in records.tensors]
        return [torch.where(is_open.view(*is_open.shape, *(1,) * (x.dim() - 2)), x, 0) for x in found]

    def _with_slow_keys(self) -> MemoryState:
        return dataclasses.replace(self, keys=self.base.all_keys) if self.config.key_update == "slow" else self

    def open_mask(self) -> Tensor:
        """Which of the tokens in :attr:`open` are tokens of the open chunk, and not masked, ``[M, P]``."""
        if not self.ragged:
            return self.last_records(number(self.filled - self.committed))[0][..., 0] >= 0
        kept = self.config.chunk_size - 1
        return torch.arange(-kept, 0, device=self.keys.device) >= -self.per_memory(self.open_tokens).unsqueeze(1)

    def as_ragged(self) -> MemoryState:
        """The same state with a count of its own for each memory."""
        if self.ragged:
            return self
        kept = self.config.chunk_size - 1
        window, waiting = self.open, self.waiting
        if window is not None:
            columns = window.columns()
            window = Appendable.of([pad(x, (0, 0) * (x.dim() - 2) + (kept - x.shape[1], 0)) for x in columns])
        if waiting is not None:
            waiting = pad(waiting, (0, 0, self.config.lookahead - waiting.shape[1], 0))
        counts = {name: self.per_memory(getattr(self, name)) for name in COUNTS}
        return dataclasses.replace(self, open=window, waiting=waiting, **counts)  # type: ignore[arg-type]

    def folded(self) -> MemoryState:
        """The same state; of a log larger than dense values the first records are folded into them, out of graphs.

        How many is a function of a memory's own records, of their number and of where chunks end: wherever calls end,
        and whatever else is in the batch, the same records give the same values, bit for bit. The open chunk's stay.
        """
        log, state = self.log, self
        if log is None or self.keeps_log or torch.compiler.is_compiling() or is_transformed(log.slots):
            return self
        recorded = log.coefficients.requires_grad or log.residuals.requires_grad
        if recorded or (self.values.requires_grad and torch.is_grad_enabled()):  # a parameter always requires it
            return self
        while state.log is not None and state.log.records.used >= state.stretch:  # or there is nothing to look at
            first = state._due()
            if not bool((first > 0).any() if isinstance(first, Tensor) else first):
                break
            state = state._without(first)
        return state

    @property
    def stretch(self) -> int:
        """As many records of a memory as are larger than its dense values."""
        assert self.log is not None
        a_record = sum(x[:1, :1].nbytes for x in self.log.records.tensors)
        return self.n_slots * self.values[:1].nbytes // a_record + 1

    def _due(self) -> int | Tensor:
        """Of each memory the records up to the first end of a chunk that is no stretch from the first, or 0."""
        size, zero = self.config.chunk_size * self.columns, self.committed * 0
        grid = self.filled - (self.position - self.origin) * self.columns  # the log's chunks end there, and size apart
        before = grid.clamp(min=0) if isinstance(grid, Tensor) else max(grid, 0)
        missing = self.stretch - before
        missing = missing.clamp(min=0) if isinstance(missing, Tensor) else max(missing, 0)
        end = before - (-missing // size) * size
        if isinstance(end, Tensor):
            return torch.where(end <= self.committed, end, zero)
        return end if end <= number(self.committed) else 0

    def _without(self, first: int | Tensor) -> MemoryState:
        """The same state, with each memory's ``first [M]`` records, of whole chunks, in its own values."""
        assert self.log is not None
        filled, lengths = self.filled, self.per_memory(first)
        if isinstance(first, Tensor) and isinstance(filled, Tensor):
            width = max(1, int((filled - first).max()))
            index = first.unsqueeze(1) + torch.arange(width, device=first.device)
            records = [rows(x, index.clamp_max(self.log.records.used - 1)) for x in self.log.records.columns()]
        else:
            records = [x[:, number(first) :].clone() for x in self.log.records.columns()]
        return dataclasses.replace(
            self,
            own_values=self.dense_values(lengths),
            log=WriteLog(Appendable.of(records), self.log.lookahead) if records[0].shape[1] else None,
            committed=self.committed - first,
        )


COUNTS = ("position", "origin", "commits", "committed")
_INDEXED = 4096  # reads in a log of a memory from which on it is indexed


def number(count: int | Tensor) -> int:
    """A count of a state whose memories are equally far."""
    assert isinstance(count, int)
    return count


def _at_most_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(max=1) if isinstance(count, Tensor) else min(count, 1)


def _where_read(slots: Tensor, own: Tensor) -> Tensor:
    return torch.where(slots < 0, slots, own)
