"""The fast-weight MLP: a memory whose fast weights are those of a dense MLP, to compare the sparse one with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import rms_norm, silu
from torch.utils._pytree import tree_map

from fwpkm.checks import require
from fwpkm.functional import MemoryResult
from fwpkm.layers.convolution import CausalConvolution
from fwpkm.layers.fwpkm import LayerResult, zscore

FIRST_RATE = 0.03  # three times as much overshoots before training, and ends in NaN
Weights = tuple[Tensor, ...]  # of the gate, of what it gates, and of the output, [..., in, out]


class MLPState(NamedTuple):
    """Where the layer stopped reading."""

    weights: Weights  # [B, in, out] each, of every sequence
    open: tuple[Tensor, Tensor, Tensor]  # queries, targets [B, P, D] and gates [B, P] of the open chunk, P < C
    inputs: Tensor | None  # [B, query_conv - 1, D], the last ones

    def detach(self) -> MLPState:
        """The same, cut from the graph that computed it."""
        return tree_map(Tensor.detach, self)


class FastWeightMLP(nn.Module):
    """:class:`fwpkm.layers.FwPKM` with a SwiGLU MLP in the place of its product-key memory.

    Targets, gates and output are the same, and queries too, but scaled to a root mean square of 1. So is the loss,
    ``1/2 g_t |y_{t+1} - v_t|^2``, here averaged over a chunk's tokens that have a target. After each chunk one step of
    gradient descent on it changes all weights of the MLP, for every sequence by itself. The weights that a sequence
    starts from and a rate for each matrix are parameters: gradients reach them through the steps (as in "Learning to
    (Learn at Test Time)", Sun et al. 2024).

    It stands in for a block's memory in :class:`fwpkm.models.FwPKMForCausalLM`, without masks and packed rows.

    Args:
        hidden_size: ``D``; queries and targets are as wide.
        inner_size: of the MLP.
        query_conv: width of the convolution on the inputs of query and gate, or 0 for none.
        chunk_size: ``C``, tokens between two steps.
    """

    def __init__(self, hidden_size: int, inner_size: int, query_conv: int, chunk_size: int) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "inner_size": inner_size, "chunk_size": chunk_size}
        for name, size in sizes.items():
            require(size >= 1, name, size, "a positive integer")
        require(query_conv >= 0, "query_conv", query_conv, "a width, or 0 for none")
        self.chunk_size = chunk_size
        self.query_norm, self.value_norm, self.gate_norm, self.output_norm = (nn.RMSNorm(hidden_size) for _ in range(4))
        self.query, self.value, self.output = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.gate = nn.Linear(hidden_size, 1)
        self.query_conv, self.gate_conv = (
            CausalConvolution(hidden_size, query_conv) if query_conv else None for _ in range(2)
        )
        shapes = ((hidden_size, inner_size), (hidden_size, inner_size), (inner_size, hidden_size))
        self.weights = nn.ParameterList(torch.randn(shape) * shape[0] ** -0.5 for shape in shapes)
        self.log_rates = nn.Parameter(torch.full((len(shapes),), math.log(FIRST_RATE)))

    def begin(self) -> None:
        """Nothing to start a training forward from: no sequence shares a memory with others."""

    def forward(
        self,
        hidden: Tensor,
        state: MLPState | None = None,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        persist: bool = True,
    ) -> LayerResult:
        """Read a piece ``[B, T, D]`` of ``B`` sequences, and learn it, from where an earlier call stopped.

        ``persist`` says nothing here: every sequence keeps its weights to itself.

        Raises:
            ValueError: for a mask, or several sequences in a row.
        """
        for name, flags in (("mask", mask), ("starts", starts)):
            require(flags is None, name, "given", "None: this layer reads one unmasked sequence a row")
        batch, length = hidden.shape[:2]
        query, gate, inputs = self._inputs(hidden, state and state.inputs)
        target = zscore(self.value(self.value_norm(hidden)))
        weights: Weights = tuple(w.expand(batch, *w.shape) for w in self.weights) if state is None else state.weights
        tokens = (query, target, gate)
        if state is not None:
            tokens = tuple(torch.cat(pair, 1) for pair in zip(state.open, tokens, strict=True))  # type: ignore[assignment]
        reads = []
        left = tuple(x[:, :0] for x in tokens)
        for chunk in zip(*(x.split(self.chunk_size, 1) for x in tokens), strict=True):
            reads.append(vmap(mlp)(weights, chunk[0]))
            if chunk[0].shape[1] < self.chunk_size:
                left = chunk
            elif self.chunk_size > 1:
                steps = vmap(grad(loss))(weights, *chunk)
                weights = tuple(w - rate * d for w, rate, d in zip(weights, self.log_rates.exp(), steps, strict=True))
        read = torch.cat(reads, 1)[:, -length:]
        weight = gate.unsqueeze(-1)
        hidden = hidden + self.output(self.output_norm(weight * read + (1 - weight) * target))
        next_state: Any = MLPState(weights, left, inputs)  # type: ignore[arg-type]
        none = hidden.new_zeros(batch, length, 0)
        return LayerResult(hidden, next_state, gate, MemoryResult(read, next_state, none.long(), none, none.sum()))

    def _inputs(self, hidden: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, gates, and of ``hidden`` what later calls need."""
        if self.query_conv is None or self.gate_conv is None:
            query, gate, inputs = self.query_norm(hidden), self.gate_norm(hidden), None
        else:
            reach = self.query_conv.width - 1
            before = hidden.new_zeros(hidden.shape[0], reach, hidden.shape[2]) if past is None else past
            inputs = torch.cat((before, hidden), 1)
            normed = self.query_norm(inputs), self.gate_norm(inputs)
            query, gate = (
                conv(x[:, reach:], x[:, :reach])
                for conv, x in zip((self.query_conv, self.gate_conv), normed, strict=True)
            )
            inputs = inputs[:, hidden.shape[1] :]
        return rms_norm(self.query(query), query.shape[-1:]), self.gate(gate).squeeze(-1).sigmoid(), inputs


def mlp(weights: Weights, x: Tensor) -> Tensor:
    """SwiGLU: ``[T, D]`` -> ``[T, D]``."""
    gate, up, down = weights
    return (silu(x @ gate) * (x @ up)) @ down


def loss(weights: Weights, query: Tensor, target: Tensor, gate: Tensor) -> Tensor:
    """Of a chunk ``[C, D], [C, D], [C]``: token ``t`` stores the target of token ``t + 1``."""
    errors = (target[1:] - mlp(weights, query[:-1])).square().sum(-1)
    return 0.5 * (gate[:-1] * errors).mean()
