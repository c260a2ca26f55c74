"""A model whose memories are switched off, and memories that begin anew while a model reads."""

from __future__ import annotations

from typing import Any

from fwpkm.memory import MemoryState
from fwpkm.models import FwPKMCache, FwPKMConfig, FwPKMForCausalLM


def never_written(model: FwPKMForCausalLM) -> FwPKMForCausalLM:
    """The same weights in a model whose memories stay what the checkpoint holds: all reads are of the base values.

    Its learning rate of fast weights is 0, so that neither values nor keys are ever written. Everything else is as in
    ``model``, whose tensors it shares.
    """
    return reconfigured(model, fwpkm_learning_rate=0.0)


def reconfigured(model: FwPKMForCausalLM, **changes: Any) -> FwPKMForCausalLM:
    """The weights of ``model``, which are shared, in a model of another configuration of the same shapes."""
    changed = FwPKMForCausalLM(FwPKMConfig.from_dict(model.config.to_dict() | changes))
    changed.load_state_dict(model.state_dict(), assign=True)
    changed.tie_weights()
    return changed.train(model.training)


def restart(cache: FwPKMCache) -> None:
    """Return all memories to the base values. Attention and the memories' convolutions go on."""
    for i, state in cache.memories.items():
        memory = state.memory
        cache.memories[i] = state._replace(memory=MemoryState.start(memory.base, memory.config, memory.batch))
