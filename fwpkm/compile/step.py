"""The inference step as a module of tensors only: what is exported, and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fwpkm.checks import require, require_choice
from fwpkm.layers.block import DecoderBlock
from fwpkm.layers.delta_net import GatedDeltaNet
from fwpkm.layers.fwpkm import FwPKM, LayerState
from fwpkm.layers.mixers import WINDOWED
from fwpkm.memory import FastWeights, MemoryState, WriteLog
from fwpkm.memory.appendable import Appendable
from fwpkm.memory.formulas import keys_commit, residual_dtype
from fwpkm.models import FwPKMForCausalLM

_RECORDS = ("slots", "coefficients", "residuals", "chunks", "gates")
_OPEN = ("sub_scores", "sub_slots", "queries")


def sizes_as_if_unknown() -> Any:
    """A context in which a graph for pieces is traced.

    Or one for more than two tokens would not take two: what is as long as all but the first is of length one.
    """
    config: Any = torch.fx.experimental._config
    return config.patch(backed_size_oblivious=True)


class BoundedState(MemoryState):
    """A ragged state whose tensors keep their shapes: the log has room for a number of records, and is never folded.

    Who records more than there is room for gets an error on a CPU, and undefined contents elsewhere.
    """

    def record(self, records: Sequence[Tensor], training: bool) -> MemoryState:
        """Write records into the room behind those that there are, in new tensors."""
        assert self.log is not None
        memory = torch.arange(self.memories, device=self.keys.device).unsqueeze(1)
        record = self.per_memory(self.filled).unsqueeze(1) + torch.arange(records[0].shape[1], device=self.keys.device)
        pairs = zip(self.log.records.tensors, records, strict=True)
        written = [old.index_put((memory, record), new.to(old.dtype)) for old, new in pairs]
        return dataclasses.replace(self, log=WriteLog(Appendable.of(written), self.log.lookahead))

    def indexed(self, *inputs: Tensor) -> MemoryState:
        """The same state: an index has no shape of its own."""
        return self

    def folded(self) -> MemoryState:
        """The same state."""
        return self


class Step(nn.Module):
    """A model's forward with everything that it remembers as tensors that come in and go out, of shapes that stay.

    All rows are equally far, and no token is masked.

    Args:
        model: in evaluation mode; its parameters and buffers are used, not copied.
        batch: ``B``, rows.
        capacity: tokens of a row for which there is room.

    Raises:
        ValueError: for a model with linear attention, or with another attention implementation than torch's, and for
            numbers that are not positive.
    """

    def __init__(self, model: FwPKMForCausalLM, batch: int, capacity: int) -> None:
        super().__init__()
        for name, value in (("batch", batch), ("capacity", capacity)):
            require(value >= 1, name, value, "a positive integer")
        linear = any(isinstance(module, GatedDeltaNet) for module in model.modules())
        require(not linear, "layer_types", model.config.layer_types, "no 'linear_attention' in a model to export")
        require_choice("attn_implementation", model.config._attn_implementation, (WINDOWED, "sdpa"))
        self.model, self.batch, self.capacity = model, batch, capacity
        # How the memories of all blocks work in inference.
        self.memory_config = dataclasses.replace(model.config.memory_config(), scope="sequence", detach_every=None)
        self.names = tuple(self.start())

    def longest(self, max_length: int | None) -> int:
        """How many tokens are read at once where ``max_length`` are asked for, or None.

        A graph of more cells than two, or that compares its length with the lookahead, is not one for every length.

        Raises:
            ValueError: if they are too many.
        """
        config = self.memory_config
        bound = min(self.capacity, config.chunk_size + 1 if config.lookahead <= 2 else 1)
        length = bound if max_length is None else max_length
        require(1 <= length <= bound, "max_length", length, "a number of tokens up to {}", bound)
        return length

    def about(self, max_length: int) -> dict[str, Any]:
        """How it is called, in numbers and words."""
        return {
            "device": str(self.model.device),
            "batch": self.batch,
            "capacity": self.capacity,
            "max_length": max_length,
            "vocab_size": self.model.config.vocab_size,
            "state": [
                {"name": name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
                for name, x in self.start().items()
            ],
        }

    def start(self) -> dict[str, Tensor]:
        """The state of sequences of which nothing has been read.

        Everything but sub-keys that move is zero: room that nothing is read from before it is written.
        """
        state = {"position": torch.zeros((), dtype=torch.int64, device=self.model.device)}
        blocks: Any = self.model.model.layers
        for i, block in enumerate(blocks):
            if block.memory is not None:
                memory = self._memory_start(block.memory)
                state |= {f"blocks.{i}.memory.{name}": x for name, x in memory.items()}
            attention = block.self_attn
            room = self.capacity if attention.sliding_window is None else attention.sliding_window - 1
            heads = attention.config.num_key_value_heads
            for name in ("keys", "values"):
                x = attention.q_proj.weight.new_zeros(self.batch, heads, room, attention.head_dim)
                state[f"blocks.{i}.attention.{name}"] = x
        return state

    def given(self) -> dict[str, Tensor]:
        """What of :meth:`start` is not zero, and has to be kept for it."""
        return {name: x for name, x in self.start().items() if x.any()}

    def _memory_start(self, layer: FwPKM) -> dict[str, Tensor]:
        config, (batch, room), heads = self.memory_config, (self.batch, self.capacity), layer.heads
        width, kept = layer.values.shape[1], config.chunk_size - 1

        def zeros(*shape: int, dtype: torch.dtype = layer.values.dtype) -> Tensor:
            return layer.values.new_zeros(batch, *shape, dtype=dtype)

        state = {
            "slots": zeros(room, heads * config.topk, dtype=torch.int64),
            "coefficients": zeros(room, heads * config.topk),
            "residuals": zeros(room, width, dtype=residual_dtype(config, training=False) or layer.values.dtype),
            "chunks": zeros(room, dtype=torch.int64),
            "gates": zeros(room),
            "waiting": zeros(config.lookahead, width),
        }
        if keys_commit(config, training=False):
            scores = kept, heads, 2, config.topk
            state["keys"] = layer.keys.detach().repeat(batch, 1, 1, 1, 1)
            state |= {"sub_scores": zeros(*scores), "sub_slots": zeros(*scores, dtype=torch.int64)}
            state["queries"] = zeros(kept, heads, 2 * layer.keys.shape[-1])
        if layer.query_conv is not None:
            features = layer.query.weight
            state["inputs"] = zeros(layer.query_conv.width - 1, features.shape[1], dtype=features.dtype)
        return state

    def forward(self, input_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Read a piece of every row.

        Args:
            input_ids: ``[B, T]`` int64.
            state: as :meth:`start` or an earlier call returned it, in that order.

        Returns:
            ``logits [B, T, V]``, and the state after it.
        """
        model = self.model.model
        old = dict(zip(self.names, state, strict=True))
        position = old["position"]
        positions = position + torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        hidden = model.embed_tokens(input_ids)
        embeddings = model.rotary_emb(hidden, positions)
        # Masks choose computations whose shapes depend on nothing; here they mask no token.
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        new = {"position": position + input_ids.shape[1]}
        blocks: Any = model.layers
        for i, block in enumerate(blocks):
            names = f"blocks.{i}.memory.", f"blocks.{i}.attention."
            memory, attention = ({k.removeprefix(p): x for k, x in old.items() if k.startswith(p)} for p in names)
            cache = _AttentionCache(attention["keys"], attention["values"], position, block.self_attn.sliding_window)
            result = block(
                hidden,
                memory_state=None if block.memory is None else self._memory_state(block, memory, position),
                mask=mask,
                cache=cache,
                position_embeddings=embeddings,
                attention_mask=cache.mask(positions),
            )
            hidden = result.hidden
            if result.memory is not None:
                new |= {names[0] + name: x for name, x in _memory_tensors(result.memory.state, memory)}
            new |= {f"{names[1]}keys": cache.keys, f"{names[1]}values": cache.values}
        return self.model.lm_head(model.norm(hidden)), [new[name] for name in old]

    def _memory_state(self, block: DecoderBlock, tensors: dict[str, Tensor], position: Tensor) -> LayerState:
        """A layer's state, of which chunk boundaries count from the first token on."""
        layer, config = block.memory, self.memory_config
        assert layer is not None
        base = FastWeights(layer.keys, layer.values)
        position = position.expand(self.batch)
        commits = position // config.chunk_size
        memory = BoundedState(
            config=config,
            base=base,
            keys=tensors.get("keys", base.all_keys),
            log=WriteLog(Appendable.of([tensors[name] for name in _RECORDS]), config.lookahead),
            open=Appendable.of([tensors[name] for name in _OPEN]) if "keys" in tensors else None,
            waiting=tensors["waiting"],
            position=position,
            origin=torch.zeros_like(position),
            commits=commits,
            committed=commits * config.chunk_size,
            memories=self.batch,
        )
        return LayerState(memory, tensors.get("inputs"))


def _memory_tensors(state: LayerState, names: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Of a layer's state those tensors that have ``names``."""
    memory = state.memory
    assert memory.log is not None
    assert memory.open is not None
    assert memory.waiting is not None
    found = dict(zip(_RECORDS, memory.log.records.tensors, strict=True)) | {"waiting": memory.waiting}
    found |= {"keys": memory.keys, **dict(zip(_OPEN, memory.open.columns(), strict=False))}
    if state.inputs is not None:
        found["inputs"] = state.inputs
    return ((name, found[name]) for name in names)


class _AttentionCache:
    """What transformers' attention asks of a cache, for one layer whose tensors keep their shapes.

    A sliding window keeps the ``window - 1`` tokens before the next, full attention all that there is room for.
    """

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, window: int | None) -> None:
        self.keys, self.values, self.position, self.window = keys, values, position, window

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of ``T`` tokens, and return all that these tokens may see."""
        length = keys.shape[2]
        if self.window is None:
            place = self.position + torch.arange(length, device=keys.device)
            self.keys, self.values = (
                old.index_copy(2, place, new) for old, new in ((self.keys, keys), (self.values, values))
            )
            return self.keys, self.values
        joined = [torch.cat(pair, 2) for pair in ((self.keys, keys), (self.values, values))]
        self.keys, self.values = (x[:, :, length:].clone() for x in joined)
        return joined[0], joined[1]

    def mask(self, positions: Tensor) -> Tensor:
        """Which of what :meth:`update` returns tokens at ``positions [1, T]`` see: ``[1, 1, T, S]``."""
        length, room = positions.shape[1], self.keys.shape[2]
        query = positions[0].unsqueeze(1)
        if self.window is None:
            return (torch.arange(room, device=positions.device) <= query).view(1, 1, length, room)
        key = self.position - room + torch.arange(room + length, device=positions.device)
        seen = (key >= 0) & (key <= query) & (key > query - self.window)
        return seen.view(1, 1, length, room + length)
