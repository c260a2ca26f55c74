"""A memory layer as one operator: ``torch.compile`` does not look into it, and vLLM splits graphs at it."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import CompilationConfig
from vllm.forward_context import get_forward_context

LIBRARY = torch.library.Library("fwpkm_vllm", "DEF")
NAME = "fwpkm_vllm::memory_"


def _memory(out: Tensor, hidden: Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].read_and_write(out, hidden)


LIBRARY.define("memory_(Tensor(a!) out, Tensor hidden, str layer) -> ()")
LIBRARY.impl("memory_", _memory, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, lambda out, hidden, layer: None, lib=LIBRARY)


def memory(hidden: Tensor, layer: str) -> Tensor:
    """The memory layer that vLLM knows by this name, on ``hidden [T, D]`` of the current forward.

    What it reads and writes are pages and metadata of that forward, which no argument says: as with attention, a graph
    that was captured around it would replay those of another step. It writes to a tensor that comes from outside, which
    the graph captured behind it finds at the same place in every step.
    """
    out = torch.empty_like(hidden)
    torch.ops.fwpkm_vllm.memory_(out, hidden, layer)
    return out


def split_graphs() -> None:
    """Have vLLM treat the operator as it does attention's: outside what it compiles and captures piece by piece."""
    if NAME not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(NAME)
