"""What a memory is: its configuration, a starting point, the write log, and the state of memories at work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require, require_choice, require_dtype, require_fast_weight_dtype, require_shape
from fwpkm.ops import Log, key_commit, memory_write_

WRITE_SCALES = ("reference", "paper", "exact")
NONLINEARITIES = ("softmax", "relu", "silu")
KEY_UPDATES = ("fast", "train_only", "slow")
SCOPES = ("sequence", "shared")


@dataclass(frozen=True)
class MemoryConfig:
    """How a memory addresses, reads and writes (the numbers refer to section 2 of docs/design.md).

    Args:
        topk: ``k``, slots a head (2).
        chunk_size: ``C``, tokens that read one version of the memory; it commits at their end.
        lookahead: ``L``, token ``t`` stores the target of token ``t + L`` (5).
        learning_rate: of both commits (6, 7).
        write_scale: ``"reference"``, ``H k C / (C - L)``, is what the released code trains with, and overshoots where
            ``learning_rate * gate * scale * sum(w^2) / N_s > 2``; ``"paper"`` is 1, equations 13 to 15; ``"exact"`` is
            ``1 / sum(w^2)``, with which a lone write at gate and rate 1 makes the next read return its target (6).
        score: ``"idw"``, inverse distance weighting, or ``"dot"`` (1).
        score_eps: of the inverse distance weighting.
        temperature: the scores are divided by it before the nonlinearity (3).
        nonlinearity: ``"softmax"`` over all ``H * k`` scores of a token, or ``"relu"`` or ``"silu"`` of each (3).
        addressing_weight: lambda, weight of the addressing loss in the key commit (7).
        key_update: ``"fast"``: keys commit after every chunk, as in the paper; ``"train_only"``: only in calls with
            ``training=True``; ``"slow"``: never, keys are parameters of the model.
        scope: ``"sequence"``: every sequence has its own memory; ``"shared"``: the batch writes to one.
        detach_every: cut the gradient through keys (but not ``"slow"`` ones) and values before every so many chunks;
            None for never.
    """

    topk: int = 8
    chunk_size: int = 512
    lookahead: int = 1
    learning_rate: float = 1.0
    write_scale: str = "reference"
    score: str = "idw"
    score_eps: float = 1e-3
    temperature: float = 1.0
    nonlinearity: str = "softmax"
    addressing_weight: float = 1.0
    key_update: str = "fast"
    scope: str = "sequence"
    detach_every: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("topk", 1), ("chunk_size", 1), ("lookahead", 0)):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= low, name, value, "an integer >= {}", low)
        for name in ("learning_rate", "addressing_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in ("score_eps", "temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        choices = {
            "write_scale": WRITE_SCALES,
            "score": ("idw", "dot"),
            "nonlinearity": NONLINEARITIES,
            "key_update": KEY_UPDATES,
            "scope": SCOPES,
        }
        for name, allowed in choices.items():
            require_choice(name, getattr(self, name), allowed)
        every = self.detach_every
        require(every is None or every >= 1, "detach_every", every, "None or an integer >= 1")


@dataclass(frozen=True)
class FastWeights:
    """A starting point of memories: sub-keys and values, dense.

    Args:
        keys: ``[H, 2, n, Dk/2]``, or ``[M, H, 2, n, Dk/2]`` for memories that start from keys of their own; float32
            (float64 for numerical checks).
        values: ``[n * n, Dv]``, dtype of ``keys``. Many memories share it, and none writes to it.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        keys = self.keys if self.keys.dim() == 5 else self.keys.unsqueeze(0)
        require_shape("keys", keys, ("M", "H", 2, "n", "Dk/2"))
        require_fast_weight_dtype("keys", keys)
        require_shape("values", self.values, (keys.shape[3] ** 2, "Dv"))
        require_dtype("values", self.values, keys.dtype)


class OpenChunk(NamedTuple):
    """The tokens of the chunk that has not been committed: ``P`` so far, in ``M`` memories."""

    slots: Tensor  # [M, P, K]
    coefficients: Tensor  # [M, P, K] learning rate * write scale * weight, for a chunk of full length
    residuals: Tensor  # [M, <= P, Dv] of the tokens whose target is known
    waiting_reads: Tensor  # [M, <= L, Dv] reads of the last tokens, whose target is still to come
    waiting_gates: Tensor  # [M, <= L]
    sub_scores: Tensor  # [M, P, H, 2, k]
    sub_slots: Tensor  # [M, P, H, 2, k]
    queries: Tensor | None  # [M, P, H, Dk], kept if the keys commit with this chunk

    @property
    def tokens(self) -> int:
        return self.slots.shape[1]

    def detach(self) -> OpenChunk:
        """The same, cut from the graph that computed it."""
        return OpenChunk(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class MemoryState:
    """``M`` memories that have read something; immutable, so that continuing it twice gives independent results.

    In the ``sequence`` scope memory ``m`` belongs to row ``m`` of the batch. In the ``shared`` scope there is one, a
    chunk is ``C`` columns of the batch, and its tokens are numbered column by column.

    Attributes:
        config: how these memories read and write.
        keys: ``[M or 1, H, 2, n, Dk/2]``.
        values: the base values ``[N, Dv]``, a reference to the starting point's; or ``[M * N, Dv]``, the memories'
            own, once their log had outgrown that (DESIGN section 3).
        log: the records of committed chunks, or None.
        open: the open chunk, or None.
        position: tokens (columns) read so far.
        origin: where chunk boundaries count from; 0 until the first early flush.
        commits: chunks committed so far.
        memories: ``M``.
        columns: rows of the batch that share a memory: 1, or ``B`` in the ``shared`` scope.
    """

    config: MemoryConfig
    keys: Tensor
    values: Tensor
    log: Log | None = None
    open: OpenChunk | None = None
    position: int = 0
    origin: int = 0
    commits: int = 0
    memories: int = 1
    columns: int = 1

    @classmethod
    def start(cls, weights: FastWeights, config: MemoryConfig, batch: int) -> MemoryState:
        """The state of ``batch`` sequences that have read nothing."""
        memories, columns = (1, batch) if config.scope == "shared" else (batch, 1)
        keys = weights.keys if weights.keys.dim() == 5 else weights.keys.unsqueeze(0)
        require(keys.shape[0] in (1, memories), "keys.shape[0]", keys.shape[0], "1 or {}, the memories", memories)
        return cls(config, keys, weights.values, memories=memories, columns=columns)

    @property
    def n_slots(self) -> int:
        return self.keys.shape[3] ** 2

    def own_slots(self, slots: Tensor) -> Tensor:
        """Slots ``[M, ...]`` as rows of ``values``, of which each memory has its own once they are folded."""
        if self.values.shape[0] == self.n_slots:
            return slots
        offset = torch.arange(self.memories, device=slots.device) * self.n_slots
        return slots + offset.view(-1, *(1,) * (slots.dim() - 1))

    def own_log(self) -> Log | None:
        """The log with :meth:`own_slots`."""
        return None if self.log is None else self.log._replace(slots=self.own_slots(self.log.slots))

    def flush(self) -> MemoryState:
        """Commit the open chunk now, with its own length as ``C``; chunk boundaries then count from here."""
        return self if self.open is None else dataclasses.replace(self.commit_open(), origin=self.position)

    def detach(self) -> MemoryState:
        """The same state, cut from the graph that computed it."""
        return dataclasses.replace(
            self,
            keys=self.keys.detach(),
            values=self.values.detach(),
            log=None if self.log is None else Log(*(x.detach() for x in self.log)),
            open=None if self.open is None else self.open.detach(),
        )

    def fold(self) -> FastWeights:
        """The dense weights this state stands for (``M = 1``): what it has committed, so flush it first for the rest.

        Raises:
            ValueError: for a state of several memories.
        """
        require(self.memories == 1, "memories", self.memories, "1: a dense copy is made for one memory")
        state = self.detach()
        return FastWeights(state.keys[0], state.dense_values())

    def dense_values(self) -> Tensor:
        """The values of every memory as far as it has committed, ``[M * N, Dv]``: base plus log, a copy."""
        shared = self.values.shape[0] == self.n_slots
        values = self.values.repeat(self.memories, 1) if shared else self.values.clone()
        if self.log is None:
            return values
        folded = dataclasses.replace(self, values=values)
        memory = torch.arange(self.memories, device=values.device).view(-1, 1)
        chunk_of_memory = self.log.chunks * self.memories + memory
        counts = reads_of_slot(self.log.slots, chunk_of_memory, self.n_slots)
        slots = folded.own_slots(self.log.slots).flatten(0, 1)
        return memory_write_(
            values, slots, (self.log.coefficients / counts).flatten(0, 1), self.log.residuals.flatten(0, 1)
        )

    # What fast_weight_memory builds new states with.

    def commit_open(self) -> MemoryState:
        """Close the open chunk, with its own length as ``C``."""
        chunk, config = self.open, self.config
        assert chunk is not None
        keys = self.keys
        if chunk.queries is not None:
            rate = config.learning_rate * config.addressing_weight
            keys = key_commit(chunk.queries, keys, chunk.sub_scores, chunk.sub_slots, None, rate, config.score)
        length = chunk.tokens // self.columns
        coefficients = chunk.coefficients * relative_write_scale(config, length)
        missing = chunk.tokens - chunk.residuals.shape[1]
        residuals = torch.nn.functional.pad(chunk.residuals, (0, 0, 0, missing))
        state = self.append(chunk.slots, coefficients, residuals, n_chunks=1)
        return dataclasses.replace(state, keys=keys, open=None)

    def append(self, slots: Tensor, coefficients: Tensor, residuals: Tensor, n_chunks: int) -> MemoryState:
        """Add the records of ``n_chunks`` equally long chunks, ``[M, R, ...]``, to the log."""
        chunks = torch.arange(self.commits, self.commits + n_chunks, device=slots.device)
        chunks = chunks.repeat_interleave(slots.shape[1] // n_chunks).expand(self.memories, -1)
        log = Log(slots, coefficients, residuals, chunks)
        if self.log is not None:
            log = Log(*(torch.cat(pair, dim=1) for pair in zip(self.log, log, strict=True)))
        state = dataclasses.replace(self, log=log, commits=self.commits + n_chunks)
        differentiable = any(x.requires_grad for x in (coefficients, residuals, log.residuals, self.values))
        dense_bytes = self.memories * self.n_slots * self.values[:1].nbytes
        if not differentiable and sum(x.nbytes for x in log) > dense_bytes:
            return dataclasses.replace(state, values=state.dense_values(), log=None)
        return state


def relative_write_scale(config: MemoryConfig, length: int) -> float:
    """Write scale of a chunk of ``length`` tokens over that of a full one; 0 if it is too short for targets (2.8)."""
    full, lookahead = config.chunk_size, config.lookahead
    if length <= lookahead:
        return 0.0
    if length == full or config.write_scale != "reference":
        return 1.0
    return (length / (length - lookahead)) * ((full - lookahead) / full)


def reads_of_slot(slots: Tensor, chunks: Tensor, n_slots: int) -> Tensor:
    """``N_s``: for each entry of ``slots [..., K]``, how many entries of the same chunk have the same slot (2.6).

    ``chunks [...]`` numbers the chunk (of a memory) that a token belongs to. Static shapes, no host sync.
    """
    entries = (slots + chunks.unsqueeze(-1) * n_slots).flatten()
    ordered = entries.sort().values
    return torch.searchsorted(ordered, entries, right=True).sub_(torch.searchsorted(ordered, entries)).view(slots.shape)
