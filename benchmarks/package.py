"""The published package ``fast-weight-product-key-memory``, where it is installed, as a memory like the others.

It is a layer, with projections around a memory and an update rule of its own. What is measured is that memory: its
projections are replaced by slices of one tensor of queries, targets and gates, and it returns what it reads instead of
a mixture of that and the target. With the options below it then computes what the others do, outputs and gradients,
but for one thing: the last token of a chunk stores the target of the first one, so its gate is closed here, which
the others, where it stores nothing, do not notice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Inputs
from fwpkm.checks import require

NAME = "fast-weight-product-key-memory"
MODULE = NAME.replace("-", "_")


def release() -> str | None:
    """Name and version of the package, or None where it (or what it needs) is not installed."""
    try:
        importlib.import_module(MODULE)
    except ImportError:
        return None
    return f"{NAME} {metadata.version(NAME)}"


class Package:
    """The package's memory, from the inputs' keys and values on."""

    def __init__(self, inputs: Inputs, case: Case) -> None:
        require(case.heads == 1, "heads", case.heads, "1: its heads have values of their own")
        require(case.key_update == "fast", "key_update", case.key_update, "'fast', what the package does")
        # its rates are those of sums and means that the others scale (section 2.6 of docs/design.md)
        rate = case.topk * case.chunk / (case.chunk - 1)
        self._module = _memory()(
            dim=case.key_dim + case.value_dim + 1,
            heads=1,
            chunk_size=case.chunk,
            num_memories=case.n_slots,
            dim_queries_keys=case.key_dim // 2,  # of each of its two queries
            dim_values=case.value_dim,
            topk=case.topk,
            learning_rate=rate,
            addressing_loss_weight=1 / rate,
            mse_loss_weight_to_keys=0.0,
            use_boundary_embed=False,
        ).requires_grad_(False)
        for name, function in _slices(case.key_dim).items():
            setattr(self._module, name, _Function(function))
        self._module.keys.copy_(inputs.keys.transpose(0, 1))
        self._module.memories.copy_(inputs.values.unsqueeze(1))

    def __call__(self, inputs: Inputs, case: Case) -> Tensor:
        output: Tensor = self._module(_tokens(inputs, case))
        return output

    @torch.no_grad()
    def state_bytes(self, inputs: Inputs, case: Case) -> float:
        """Of a sequence, when it has read the inputs."""
        _, memories = self._module(_tokens(inputs, case), return_next_memories=True)
        return sum(x.nbytes for x in memories if isinstance(x, Tensor)) / case.batch


def _tokens(inputs: Inputs, case: Case) -> Tensor:
    """Queries, targets and gates side by side, ``[B, T, Dk + Dv + 1]``."""
    stores = torch.arange(1, case.tokens + 1) % case.chunk != 0
    return torch.cat((inputs.query.flatten(2), inputs.target, (inputs.gate * stores).unsqueeze(-1)), -1)


def _slices(key_dim: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What stands in for its projections, of which each token is a concatenation."""
    return {
        "to_queries": lambda x: x[..., :key_dim].unflatten(-1, (2, 1, -1)).movedim(-3, 0),
        "to_values": lambda x: x[..., key_dim:-1].unsqueeze(-2),
        "to_gates": lambda x: x[..., -1:, None],
        "to_out": lambda x: x,
    }


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def _memory() -> Any:
    base: Any = importlib.import_module(MODULE).fwPKM

    class Reading(base):
        def retrieve(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
            _, found = super().retrieve(*args, **kwargs)
            return found["values"].flatten(-2), found

    return Reading
