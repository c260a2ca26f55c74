"""A model with a memory that lasts: read documents, ask about them, take them back, keep them on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.data.codec import Codec
from fwpkm.layers.host import CACHE
from fwpkm.memory import FastWeights, MemoryState
from fwpkm.memory.forget import forget
from fwpkm.models import FwPKMCache, FwPKMForCausalLM

Text = str | bytes | Sequence[int] | Tensor


@dataclass(frozen=True)
class Reading:
    """One pass over a document: it ends in a commit, and has a record a token in every memory.

    Attributes:
        document: whose.
        tokens: of it.
        folded: whether its records have been added up with others, and can no longer be taken back.
    """

    document: str
    tokens: int
    folded: bool = False


class Session:
    """What a model has read, in memories that outlive the texts.

    Only the memories last. Attention and the memories' convolutions begin anew with each document and each question,
    so that what is recalled of a document that was read before comes out of a memory. The memories keep the record of
    every token until :meth:`fold`, which :meth:`undo` and :meth:`forget` need; a log can grow beyond dense values.

    The model is in evaluation, and its weights, which the memories started from, must not change meanwhile.

    Args:
        model: with at least one memory layer.
        codec: of its texts; bytes unless given.

    Attributes:
        memories: the state of each memory layer, by the number of its block.
        readings: in their order.
    """

    def __init__(self, model: FwPKMForCausalLM, codec: Codec | None = None) -> None:
        codec = codec or Codec()
        layers = model.config.fwpkm_layers
        require(bool(layers), "model.config.fwpkm_layers", layers, "a block with a memory")
        size = model.config.vocab_size
        require(codec.vocab_size <= size, "codec.vocab_size", codec.vocab_size, "at most the model's {}", size)
        self.model, self.codec = model, codec
        self.memories: dict[int, MemoryState] = {i: _start(model, i) for i in layers or ()}
        self.readings: tuple[Reading, ...] = ()

    @property
    def documents(self) -> list[str]:
        """The documents in the order in which they were read first."""
        return list(dict.fromkeys(reading.document for reading in self.readings))

    @property
    def nbytes(self) -> int:
        """What the memories hold beyond the model's own weights."""
        states = self.memories.values()
        logs = sum(x.nbytes for s in states if s.log is not None for x in s.log.records.columns())
        return logs + sum(s.own_values.nbytes for s in states if s.own_values is not None)

    def read(self, text: Text, passes: int = 1, name: str | None = None) -> str:
        """Read a document into the memories, ``passes`` times, each ending in a commit, and return its name.

        A later pass writes what the memories still get wrong of it. A name that is known already adds to that document.

        Args:
            text: a text, or its tokens.
            passes: how often.
            name: ``"document 1"``, ``"document 2"``, ... unless given.

        Raises:
            ValueError: for an empty text, or a model that is not in evaluation. Nothing has been read then.
        """
        require(passes >= 1, "passes", passes, "a positive integer")
        tokens = self._tokens("text", text)
        name = self._unused_name() if name is None else name
        memories = self.memories
        for _ in range(passes):
            cache = self._cache(memories)
            self.model.read(tokens, cache)
            memories = _commit(cache)
        self.memories = memories
        self.readings += (Reading(name, tokens.shape[1]),) * passes
        return name

    def ask(self, prompt: Text, max_new_tokens: int = 64, **how: Any) -> str:
        """What the model adds to a prompt, with the memories at hand. They stay as they are.

        To keep an exchange, :meth:`read` it.

        Args:
            prompt: a text, or its tokens.
            max_new_tokens: at most.
            how: arguments of ``generate``; the likeliest token each time unless ``do_sample=True``.

        Raises:
            ValueError: for an empty prompt, or a model that is not in evaluation.
        """
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "a positive integer")
        tokens = self._tokens("prompt", prompt)
        cache = self._cache(self.memories)
        self.model.read(tokens[:, :-1], cache)  # generate() reads the last one
        how = {"do_sample": False, "attention_mask": torch.ones_like(tokens)} | how
        known = self.model.generate(tokens, **{CACHE: cache}, max_new_tokens=max_new_tokens, **how)
        decoder = self.codec.decoder()
        answer: list[int] = known[0, tokens.shape[1] :].tolist()
        return "".join(map(decoder.decode, answer)) + decoder.finish()

    def fork(self) -> Session:
        """A session that knows the same; what either reads from now on the other does not."""
        other = Session(self.model, self.codec)
        other.memories, other.readings = dict(self.memories), self.readings
        return other

    def undo(self, readings: int = 1) -> None:
        """Take back the last ``readings`` (passes): the session is what it was before them, bit for bit.

        Raises:
            ValueError: if there are fewer that are not folded, or keys move (``key_update="fast"``). Nothing changes.
        """
        kept = sum(not reading.folded for reading in self.readings)
        require(0 <= readings <= kept, "readings", readings, "at most the {} that are not folded", kept)
        self._forget(range(len(self.readings) - readings, len(self.readings)))

    def forget(self, document: str) -> None:
        """Drop the records of all readings of a document.

        The memories are then exactly the base and the records of everything else. Of a document that was read last this
        is never to have read it, bit for bit. Otherwise it is near that, no more: what was read later stored the
        difference to what the memories gave, the document's part included, and keeps what it stored.

        Raises:
            ValueError: if it was not read, is folded, or keys move (``key_update="fast"``). Nothing changes.
        """
        which = [i for i, reading in enumerate(self.readings) if reading.document == document]
        require(bool(which), "document", repr(document), "one of {}", self.documents)
        folded = any(self.readings[i].folded for i in which)
        require(not folded, "document", repr(document), "one that is not folded: its records are no longer known")
        self._forget(which)

    def fold(self) -> None:
        """Add all records up into dense values: the memories take as much as the model's own from then on.

        Reads give the same up to rounding; what has been read until now can no longer be taken back.
        """
        folded = {}
        for i, state in self.memories.items():
            folded[i] = dataclasses.replace(state, own_values=state.dense_values(), log=None, committed=0)
        self.memories = folded
        self.readings = tuple(dataclasses.replace(reading, folded=True) for reading in self.readings)

    def save(self, path: str | Path) -> int:
        """Write the session to a folder, without the model, and return its size in bytes.

        Whatever interrupts this, :meth:`load` finds there what it found before, or all that is new.

        Raises:
            ValueError: if ``path`` holds something that is no session.
            OSError: if it cannot be written.
        """
        from fwpkm.session_file import save_session  # a file format is built on what it holds

        return save_session(self, Path(path))

    @staticmethod
    def load(path: str | Path, model: FwPKMForCausalLM, codec: Codec | None = None) -> Session:
        """Read a session that was saved with the same model.

        Raises:
            ValueError: if it is none, is damaged, of another version, or of a model with other weights.
            OSError: if it cannot be read.
        """
        from fwpkm.session_file import load_session

        return load_session(Path(path), model, codec)

    def _forget(self, which: Sequence[int]) -> None:
        """Without the readings ``which`` (ascending), none folded."""
        memories = self.memories
        for i in reversed(which):  # the records before stay where they are
            last = sum(reading.tokens for reading in self.readings[: i + 1] if not reading.folded)
            first = last - self.readings[i].tokens
            memories = {layer: settled(forget(state, first, last)) for layer, state in memories.items()}
        self.memories = memories
        self.readings = tuple(reading for i, reading in enumerate(self.readings) if i not in which)

    def _tokens(self, argument: str, text: Text) -> Tensor:
        """``[1, T]``."""
        if isinstance(text, str | bytes):
            text = self.codec.encode(text.encode() if isinstance(text, str) else text).astype(np.int64).tolist()
        tokens = torch.as_tensor(text, dtype=torch.int64, device=self.model.device)
        require(tokens.dim() == 1, f"{argument}.shape", list(tokens.shape), "[T], the tokens of one text")
        require(tokens.numel() >= 1, argument, "empty", "at least one token")
        low, high = int(tokens.min()), int(tokens.max())
        size = self.model.config.vocab_size
        require(low >= 0 and high < size, argument, f"of tokens in [{low}, {high}]", "tokens in [0, {})", size)
        return tokens.unsqueeze(0)

    def _cache(self, memories: dict[int, MemoryState]) -> FwPKMCache:
        """The beginning of a text, for a model that remembers other texts."""
        require(not self.model.training, "model", "in training", "one in evaluation: model.eval()")
        return FwPKMCache.remembering(self.model.config, memories)

    def _unused_name(self) -> str:
        number = len(self.documents) + 1
        while f"document {number}" in self.documents:
            number += 1
        return f"document {number}"


@torch.no_grad()
def settled(state: MemoryState) -> MemoryState:
    """The same state, with the index that it would get if it had just been loaded: reads then have the same bits."""
    log = state.log and dataclasses.replace(state.log, index=None)
    return dataclasses.replace(state, log=log, keeps_log=True).indexed()


def base_of(model: FwPKMForCausalLM, block: int) -> FastWeights:
    """What the memory of a block starts from."""
    layer: Any = model.model.layers[block].memory
    return FastWeights(layer.keys.detach(), layer.values.detach())


def _start(model: FwPKMForCausalLM, block: int) -> MemoryState:
    config = dataclasses.replace(model.config.memory_config(), scope="sequence")  # as in evaluation
    return settled(MemoryState.start(base_of(model, block), config, 1))


def _commit(cache: FwPKMCache) -> dict[int, MemoryState]:
    """The memories at the end of a text."""
    cache.flush()
    return {i: settled(state.memory) for i, state in cache.memories.items()}
