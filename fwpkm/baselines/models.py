"""Which models are compared, and how each is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import set_seed

from fwpkm.baselines.fast_weight_mlp import FastWeightMLP, MLPState
from fwpkm.demo import DemoSettings, for_sequences
from fwpkm.layers.fwpkm import LayerState
from fwpkm.memory import KEY_UPDATES, WRITE_SCALES, MemoryState
from fwpkm.models import FwPKMCache, FwPKMConfig, FwPKMForCausalLM


@dataclass(frozen=True)
class Baseline:
    """A model to compare.

    Args:
        name: in tables and files.
        changes: of the demo's configuration with a memory.
        fast_weight_mlp: put a :class:`FastWeightMLP` where the demo has its memory.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    fast_weight_mlp: bool = False

    def build(self, settings: DemoSettings) -> FwPKMForCausalLM:
        """The untrained model, the same for the same settings."""
        set_seed(settings.seed)
        config = FwPKMConfig.from_dict(settings.model_config(memory=True).to_dict() | self.changes)
        model = FwPKMForCausalLM(config)
        if self.fast_weight_mlp:
            model.model.layers[0].memory = FastWeightMLP(
                config.hidden_size, config.intermediate_size, settings.query_conv, settings.training_chunk
            )
        return model

    def for_sequences(self, model: FwPKMForCausalLM, settings: DemoSettings) -> FwPKMForCausalLM:
        """The trained model as it is asked: as in the demo, but a :class:`FastWeightMLP` keeps its chunks.

        A step of gradient descent on the mean of a longer chunk would be another one than was trained.
        """
        return model if self.fast_weight_mlp else for_sequences(model, settings.chunk)


def baselines(settings: DemoSettings) -> list[Baseline]:
    """No memory and other memories; all ways to update keys and scale writes; then two things left out: the query
    convolution, and the price of an open gate.
    """
    blocks = settings.model_config(memory=True).num_hidden_layers
    width = settings.width
    slow = {
        "pkm_layers": [0],
        "pkm_n_subkeys": settings.n_subkeys,
        "pkm_key_dim": width,
        "pkm_value_dim": width,
        "pkm_topk": min(8, settings.n_subkeys),
    }
    others = [
        Baseline("full attention", {"fwpkm_layers": [], "layer_types": ["full_attention"] * blocks}),
        Baseline("no memory", {"fwpkm_layers": []}),
        Baseline("slow PKM", {"fwpkm_layers": []} | slow),
        Baseline("fast-weight MLP", {"fwpkm_layers": []}, fast_weight_mlp=True),
    ]
    grid = [
        Baseline(f"FwPKM {key_update} {write_scale}", _options(key_update, write_scale, settings.query_conv))
        for key_update in KEY_UPDATES
        for write_scale in WRITE_SCALES
    ]
    free = _options("slow", "exact", settings.query_conv) | {"fwpkm_gate_weight": 0.0}
    ablations = [
        Baseline("FwPKM slow exact, no query_conv", _options("slow", "exact", 0)),
        Baseline("FwPKM slow exact, free gate", free),
    ]
    return [*others, *grid, *ablations]


def _options(key_update: str, write_scale: str, query_conv: int) -> dict[str, Any]:
    return {"fwpkm_key_update": key_update, "fwpkm_write_scale": write_scale, "fwpkm_query_conv": query_conv}


def state_bytes(cache: FwPKMCache) -> int:
    """What a model keeps of the sequences it is reading, beside its weights: of attention, and of its memories.

    Of a write log, records are counted but not the index that the CPU reads it by.
    """
    attention = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.nbytes for x in attention) + sum(map(_memory_bytes, cache.memories.values()))


def _memory_bytes(state: LayerState | MLPState) -> int:
    if isinstance(state, MLPState):
        kept: list[Tensor | None] = [*state.weights, *state.open, state.inputs]
    else:
        memory: MemoryState = state.memory
        moved = memory.keys.data_ptr() != memory.base.keys.data_ptr()
        kept = [memory.own_values, memory.waiting, memory.keys if moved else None, state.inputs]
        for columns in (memory.log and memory.log.records, memory.open):
            kept += columns.columns() if columns else []
    return sum(x.nbytes for x in kept if x is not None)
