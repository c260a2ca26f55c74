"""The fast-weight product-key memory layer (DESIGN 2.10; paper, section 3.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from fwpkm.checks import require, require_dtype, require_shape
from fwpkm.functional import MemoryResult, fast_weight_memory
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.layers.repetition import Repetitions, SharedStart, before_commit
from fwpkm.layers.weights import MemoryWeights, at_least_float32
from fwpkm.memory import FastWeights, MemoryConfig, MemoryState
from fwpkm.memory.appendable import is_batched, normal
from fwpkm.memory.changes import Changes
from fwpkm.memory.packing import following
from fwpkm.memory.trail import Trail, leaves_trail, require_reach


class LayerState(NamedTuple):
    """Where a layer stopped reading: its memories, and the last inputs that its convolutions need (or None)."""

    memory: MemoryState
    inputs: Tensor | None  # [B, query_conv - 1, D], ending with the last token of each row; zeros before it
    trail: Trail | None = None  # of the inputs

    def select(self, indices: Tensor) -> LayerState:
        """The rows ``indices``, as :meth:`fwpkm.MemoryState.select`."""

        def rows_of(x: Tensor) -> Tensor:
            return x[indices]

        inputs = None if self.inputs is None else rows_of(self.inputs)
        return LayerState(self.memory.select(indices), inputs, self.trail and self.trail.map(rows_of, rows_of))

    def detach(self) -> LayerState:
        """The same, cut from the graph that computed it, as :meth:`fwpkm.MemoryState.detach`."""
        inputs = None if self.inputs is None else self.inputs.detach()
        return LayerState(self.memory.detach(), inputs, self.trail and self.trail.map(Tensor.detach, Tensor.detach))

    def crop(self, tokens: int) -> LayerState:
        """Without the last ``tokens`` of every row, as :meth:`fwpkm.MemoryState.crop`."""
        memory = self.memory.crop(tokens)
        if self.inputs is None or tokens == 0:
            return self._replace(memory=memory)
        require_reach(tokens, 0 if self.trail is None else self.trail.reach)
        assert self.trail is not None
        inputs, trail = self.trail.back(tokens)
        return LayerState(memory, inputs, trail)


class LayerResult(NamedTuple):
    """What a layer computed: its output, where it stopped, and what its memory did."""

    hidden: Tensor  # [B, T, D]
    state: LayerState
    gate: Tensor  # [B, T]
    memory: MemoryResult


class FwPKM(MemoryWeights):
    """A layer that reads from and writes to a fast-weight memory of ``n_subkeys ** 2`` slots.

    ``q = Wq RMSNorm(h)``, ``y = zscore(Wv RMSNorm(h))``, ``g = sigmoid(Wg RMSNorm(h))``; with ``v`` what the memory
    gives for ``q``, the result is ``h + Wo RMSNorm(g v + (1 - g) y)``. It sits before a block's token mixer.

    ``keys`` and ``values`` are float32 buffers, or parameters (``keys`` with ``key_update="slow"``, ``values`` with
    ``learn_initial_values``), stay float32 in a model cast to half precision, and are never written by a forward.
    In the ``sequence`` scope, and always in evaluation, every sequence starts from them and goes on by itself. In the
    ``shared`` scope a training forward on new sequences (``state=None``) writes to one memory for the batch; what it
    has stored waits as ``pending`` until :meth:`commit` writes it into the buffers, which the language model does
    before its next training forward. Checkpointed, repeated and evaluation forwards so change nothing.

    Args:
        hidden_size: ``D``.
        n_subkeys: ``n``, sub-keys a codebook.
        key_dim: ``Dk``, even.
        value_dim: ``Dv``.
        heads: ``H``, addresses a token; the heads share the values.
        query_conv: width of a causal depthwise convolution on the inputs of the query and of the gate, so that an
            address and what is worth storing depend on the last few tokens; 0 for none, as in the paper.
        config: how the memory addresses, reads and writes.
        learn_initial_values: whether gradients reach the values that every sequence starts from; with
            ``config.detach_every``, from the chunks before the first cut.
    """

    def __init__(
        self,
        hidden_size: int,
        n_subkeys: int = 512,
        key_dim: int = 512,
        value_dim: int = 512,
        heads: int = 1,
        query_conv: int = 0,
        config: MemoryConfig = MemoryConfig(),
        learn_initial_values: bool = False,
    ) -> None:
        learn_keys = config.key_update == "slow"
        super().__init__(n_subkeys, key_dim, value_dim, heads, learn_keys, learn_initial_values)
        require(hidden_size >= 1, "hidden_size", hidden_size, "a positive integer")
        require(query_conv >= 0, "query_conv", query_conv, "a width, or 0 for none")
        require(config.topk <= n_subkeys, "config.topk", config.topk, "at most n_subkeys ({})", n_subkeys)
        persists = config.scope == "shared" and learn_initial_values
        require(not persists, "learn_initial_values", True, "False with scope 'shared': its memory is written there")
        self.config = config
        self.hidden_size = hidden_size
        self.query_norm = nn.RMSNorm(hidden_size)
        self.query = nn.Linear(hidden_size, heads * key_dim)
        self.value_norm = nn.RMSNorm(hidden_size)
        self.value = nn.Linear(hidden_size, value_dim)
        self.gate_norm = nn.RMSNorm(hidden_size)
        self.gate = nn.Linear(hidden_size, 1)
        self.output_norm = nn.RMSNorm(value_dim)
        self.output = nn.Linear(value_dim, hidden_size)
        self.query_conv = CausalConvolution(hidden_size, query_conv) if query_conv else None
        self.gate_conv = CausalConvolution(hidden_size, query_conv) if query_conv else None

        self.pending: Changes | None = None
        self.repetitions = Repetitions()
        self.discard()

    def begin(self) -> SharedStart | None:
        """What a training forward on new sequences starts from in the ``shared`` scope; None otherwise."""
        return SharedStart(self) if self.training and self.config.scope == "shared" else None

    def forward(
        self,
        hidden: Tensor,
        state: LayerState | SharedStart | None = None,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        persist: bool = True,
    ) -> LayerResult:
        """Read a piece of ``B`` sequences, and write it.

        Args:
            hidden: ``[B, T, D]``.
            state: where an earlier call stopped, or None at the start of the sequences; or what :meth:`begin` gave, to
                which the caller leaves what this call has stored (:meth:`SharedStart.leave`).
            mask: ``[B, T]`` bool; a sequence is its unmasked tokens. None if all are.
            starts: ``[B, T]`` bool, true at (unmasked) tokens that begin another sequence within a row, or None.
            persist: whether training in the ``shared`` scope leaves what new sequences store ``pending``; if not, their
                memory is in the state alone, from which later calls go on.

        Returns:
            ``hidden [B, T, D]`` with what the memory gave added (of no meaning at masked tokens), the state to continue
            from, and what happened: gates, slots, weights, addressing loss.

        Raises:
            ValueError: for a wrong shape or dtype, another batch than that of the state, or under ``vmap`` what would
                have to persist.
        """
        require_shape("hidden", hidden, ("B", "T", self.hidden_size))
        for name, flags in (("mask", mask), ("starts", starts)):
            if flags is not None:
                require_shape(name, flags, hidden.shape[:2])
                require_dtype(name, flags, torch.bool)
        past = state if isinstance(state, LayerState) else None
        own = self.begin() if persist and state is None else None
        begun = state if isinstance(state, SharedStart) else own
        query_input, gate_input, inputs, trail = self._inputs(hidden, past, mask, starts)
        query = rearrange(self.query(query_input), "b t (h d) -> b t h d", h=self.heads)
        target = zscore(self.value(self.value_norm(hidden)))
        gate = at_least_float32(self.gate(gate_input).squeeze(-1)).sigmoid()
        start: FastWeights | MemoryState = FastWeights(self.keys, self.values)
        config = self.config
        if past is not None:
            start, config = past.memory, past.memory.config
        elif begun is not None:
            start = begun.weights()
        elif not self.training:
            config = dataclasses.replace(config, scope="sequence")
        result = fast_weight_memory(
            query,
            target,
            gate,
            start,
            config,
            mask=mask,
            reset=starts if config.scope == "sequence" else None,
            commit_partial=begun is not None,
            training=self.training,
        )
        if begun is not None:
            where = "hidden or the layer's tensors"
            require(not is_batched(result.output), where, "batched by vmap", "plain tensors in the 'shared' scope")
        if own is not None:
            own.leave(result.state)
        weight = gate.unsqueeze(-1)
        mixed = weight * result.output + (1 - weight) * target
        hidden = hidden + self.output(self.output_norm(mixed.to(hidden.dtype)))
        return LayerResult(hidden, LayerState(result.state, inputs, trail), gate, result)

    def commit(self) -> None:
        """Write what the last training forward stored in the ``shared`` memory into ``keys`` and ``values``."""
        if self.pending is not None:
            before_commit(self, self.pending)
            self.pending.apply_(FastWeights(self.keys.detach(), self.values.detach()))
        self.discard()

    def discard(self) -> None:
        """Forget what the last training forward stored in the ``shared`` memory."""
        if self.config.scope == "shared":  # a graph takes one number of rows for another, but not None
            weights = FastWeights(self.keys.detach(), self.values.detach())
            self.pending = Changes.none(weights, self.heads * self.config.topk)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FwPKM:
        self.commit()  # where the fast weights still are
        super()._apply(fn, recurse)
        self.discard()  # and nothing waits where they have been
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.commit()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.discard()

    def _inputs(
        self, hidden: Tensor, state: LayerState | None, mask: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Trail | None]:
        """The inputs of the query and of the gate, of ``hidden`` what later calls need, and the trail of that."""
        if self.query_conv is None or self.gate_conv is None:
            return self.query_norm(hidden), self.gate_norm(hidden), None, None
        reach = self.query_conv.width - 1
        past = None if state is None else state.inputs
        if past is None:
            past = hidden.new_zeros(hidden.shape[0], reach, hidden.shape[2])
        elif not torch.compiler.is_compiling():
            past = normal(past)
        convolved = []
        for norm, conv in ((self.query_norm, self.query_conv), (self.gate_norm, self.gate_conv)):
            x = norm(torch.cat((past, hidden), 1))
            convolved.append(conv(x[:, reach:], x[:, :reach], mask, starts))
        if not leaves_trail(self.training):
            return convolved[0], convolved[1], following(past, hidden, mask, starts), None
        trail = None if state is None else state.trail
        past, trail = (trail or Trail(_read_again)).follow(past, (hidden, mask, starts))
        return convolved[0], convolved[1], past, trail

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


def _read_again(past: Tensor, given: tuple[Tensor | None, ...]) -> Tensor:
    """The inputs that convolutions need after ``hidden, mask, starts``."""
    hidden, mask, starts = given
    assert hidden is not None
    return following(past, hidden, mask, starts)


def zscore(x: Tensor) -> Tensor:
    """Each vector with mean 0 and unbiased standard deviation 1, in float32 (DESIGN 2.10)."""
    x = at_least_float32(x)
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
