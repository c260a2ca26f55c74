"""What the state of a sequence takes once it has read a case's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

import fwpkm
from benchmarks.cases import Case, Inputs
from benchmarks.package import Package
from benchmarks.released import Released


@torch.no_grad()
def state_bytes(name: str, inputs: Inputs, case: Case) -> float:
    """Bytes a sequence, beyond the weights that all start from.

    Ours is what a :class:`fwpkm.MemoryState` refers to: the write log with the room that it has, keys that have moved.
    The plain composition and the released code have keys and values of their own.
    """
    if name == "plain":
        return inputs.keys.nbytes + inputs.values.nbytes
    if name == "released":
        return Released(inputs, dataclasses.replace(case, batch=1)).state_bytes()
    if name == "package":
        return Package(inputs, case).state_bytes(inputs, case)
    memory = inputs.query, inputs.target, inputs.gate, inputs.weights
    state = fwpkm.fast_weight_memory(*memory, case.config).state
    shared = {x.untyped_storage().data_ptr() for x in (inputs.keys, inputs.values)}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(state)}
    return sum(size for place, size in storages.items() if place not in shared) / case.batch


def _tensors(x: object) -> Iterator[Tensor]:
    """All that is in a structure of dataclasses and tuples."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(x):
        for field in dataclasses.fields(x):
            yield from _tensors(getattr(x, field.name))
