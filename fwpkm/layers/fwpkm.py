"""The fast-weight product-key memory layer (DESIGN 2.10; paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from fwpkm.checks import require, require_shape
from fwpkm.functional import MemoryResult, fast_weight_memory
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.memory import FastWeights, MemoryConfig, MemoryState


class LayerState(NamedTuple):
    """Where a layer stopped reading: its memories, and the last inputs of its convolutions (None without them)."""

    memory: MemoryState
    query_inputs: Tensor | None  # [B, query_conv - 1, D]
    gate_inputs: Tensor | None  # [B, query_conv - 1, D]


class LayerResult(NamedTuple):
    """What a layer computed: its output, where it stopped, and what its memory did."""

    hidden: Tensor  # [B, T, D]
    state: LayerState
    gate: Tensor  # [B, T]
    memory: MemoryResult


class FwPKM(nn.Module):
    """A layer that reads from and writes to a fast-weight memory of ``n_subkeys ** 2`` slots.

    ``q = Wq RMSNorm(h)``, ``y = zscore(Wv RMSNorm(h))``, ``g = sigmoid(Wg RMSNorm(h))``; with ``v`` what the memory
    gives for ``q``, the result is ``h + Wo RMSNorm(g v + (1 - g) y)``. It sits before a block's token mixer.

    ``keys`` and ``values`` are float32 buffers (``keys`` a parameter with ``key_update="slow"``), stay float32 in a
    model cast to another dtype, and are never written by a forward: every sequence starts from them and goes on by
    itself.

    Args:
        hidden_size: ``D``.
        n_subkeys: ``n``, sub-keys a codebook.
        key_dim: ``Dk``, even.
        value_dim: ``Dv``.
        heads: ``H``, addresses a token; the heads share the values.
        query_conv: width of a causal depthwise convolution on the inputs of the query and of the gate, so that an
            address and what is worth storing depend on the last few tokens; 0 for none, as in the paper.
        config: how the memory addresses, reads and writes.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_subkeys: int = 512,
        key_dim: int = 512,
        value_dim: int = 512,
        heads: int = 1,
        query_conv: int = 0,
        config: MemoryConfig = MemoryConfig(),
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("n_subkeys", n_subkeys), ("value_dim", value_dim)):
            require(size >= 1, name, size, "a positive integer")
        require(key_dim >= 2 and key_dim % 2 == 0, "key_dim", key_dim, "a positive even number, one half a codebook")
        require(heads >= 1, "heads", heads, "a positive integer")
        require(query_conv >= 0, "query_conv", query_conv, "a width, or 0 for none")
        require(config.topk <= n_subkeys, "config.topk", config.topk, "at most n_subkeys ({})", n_subkeys)
        self.config = config
        self.heads = heads
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
        keys = torch.empty(heads, 2, n_subkeys, key_dim // 2, dtype=torch.float32)
        if config.key_update == "slow":
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("values", torch.empty(n_subkeys**2, value_dim, dtype=torch.float32))
        self.reset_fast_weights()

    @torch.no_grad()
    def reset_fast_weights(self) -> None:
        """Draw initial sub-keys, uniform in ``+-Dk^-1/2``, and values, normal with standard deviation ``Dv^-1/2``."""
        bound = (2 * self.keys.shape[-1]) ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.values, std=self.values.shape[1] ** -0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FwPKM:
        fast = {"keys": self.keys.detach(), "values": self.values.detach()}
        super()._apply(fn, recurse)
        for name, before in fast.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:  # a cast: repeat it without the change of dtype
                after.data = before.to(after.device)
        return self

    def forward(self, hidden: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Read a piece of ``B`` sequences, and write it.

        Args:
            hidden: ``[B, T, D]``.
            state: where an earlier call stopped, or None at the start of the sequences.

        Returns:
            ``hidden [B, T, D]`` with what the memory gave added, and the state to continue from.
        """
        result = self.read_and_write(hidden, state)
        return result.hidden, result.state

    def read_and_write(self, hidden: Tensor, state: LayerState | None = None) -> LayerResult:
        """:meth:`forward` with everything that happened: gates, slots, weights, addressing loss."""
        require_shape("hidden", hidden, ("B", "T", self.query.in_features))
        query_input, query_past = _convolve(self.query_conv, self.query_norm(hidden), state and state.query_inputs)
        gate_input, gate_past = _convolve(self.gate_conv, self.gate_norm(hidden), state and state.gate_inputs)
        query = rearrange(self.query(query_input), "b t (h d) -> b t h d", h=self.heads)
        target = zscore(self.value(self.value_norm(hidden)))
        gate = self.gate(gate_input).squeeze(-1).float().sigmoid()
        start = FastWeights(self.keys, self.values) if state is None else state.memory
        result = fast_weight_memory(query, target, gate, start, self.config, training=self.training)
        weight = gate.unsqueeze(-1)
        mixed = weight * result.output + (1 - weight) * target
        hidden = hidden + self.output(self.output_norm(mixed.to(hidden.dtype)))
        return LayerResult(hidden, LayerState(result.state, query_past, gate_past), gate, result)

    def extra_repr(self) -> str:
        heads, _, n, half = self.keys.shape
        return f"slots={n * n}, key_dim={2 * half}, value_dim={self.values.shape[1]}, heads={heads}, {self.config}"


def _convolve(conv: CausalConvolution | None, x: Tensor, past: Any) -> tuple[Tensor, Tensor | None]:
    return (x, None) if conv is None else conv(x, past)


def zscore(x: Tensor) -> Tensor:
    """Each vector with mean 0 and unbiased standard deviation 1, in float32 (DESIGN 2.10)."""
    x = x.float()
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
