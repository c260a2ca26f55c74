"""What the memories of a model do along a text: gates, slots, and where each read comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.data.codec import Codec
from fwpkm.layers.block import BlockResult
from fwpkm.memory.attribution import Writes, seen_by_own_tokens
from fwpkm.memory.formulas import reads_of_slot
from fwpkm.memory.state import MemoryState
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from fwpkm.session import Session

_PIECE = 1024  # tokens whose logits are held at once


class SlotUsage(NamedTuple):
    """How the reads of a text, ``K`` a token, use the slots of a memory.

    Attributes:
        coverage: share of all slots that are read at least once.
        collisions: share of the reads whose slot is read more than once in their chunk (``N_s > 1``): what they write
            there is averaged with what others write.
        divergence: Kullback-Leibler divergence in nats of the slots' shares of the reads from the uniform
            distribution: 0 when all are read equally often, ``log N`` when all reads are of one slot.
    """

    coverage: float
    collisions: float
    divergence: float


class Source(NamedTuple):
    """A token that stored a part of what another one read.

    Attributes:
        position: of the token at whose address the part was stored.
        target: of the token that was stored, ``lookahead`` later.
        share: of the read, signed: its projection on the read over the read.
        text: the text around the target.
    """

    position: int
    target: int
    share: float
    text: str


@dataclass(frozen=True)
class InspectedLayer:
    """What one memory did along ``T`` tokens; shares of a read add up to 1 with those of the sources left out.

    Attributes:
        block: the number of its block.
        n_slots: slots that it has.
        gates: ``[T]``.
        slots: ``[T, K]``.
        weights: ``[T, K]``.
        base: ``[T]`` share of the read that was there before the text.
        sources: ``[T, top]`` positions of the tokens that stored the largest shares of the rest; -1 for none.
        shares: ``[T, top]`` of these, signed.
        usage: of the slots.
        error: largest difference between a number of a read and the sum of all its parts.
    """

    block: int
    n_slots: int
    gates: Tensor
    slots: Tensor
    weights: Tensor
    base: Tensor
    sources: Tensor
    shares: Tensor
    usage: SlotUsage
    error: float


@dataclass(frozen=True)
class Inspection:
    """A text as a model read it.

    Attributes:
        texts: what each token adds to the text (nothing before the last byte of a character).
        lookahead: a token stores the one that many later.
        chunk_size: tokens that read the same version of a memory.
        guesses: the text of the token that was likeliest to follow each.
        confidence: ``[T]`` its probability.
        probability: ``[T - 1]`` that of the token that did follow.
        layers: one for each memory.
    """

    texts: list[str]
    lookahead: int
    chunk_size: int
    guesses: list[str]
    confidence: Tensor
    probability: Tensor
    layers: tuple[InspectedLayer, ...]

    def recalled(self, position: int, layer: int = 0, around: int = 32) -> list[Source]:
        """The strongest sources of what the token at ``position`` read, with the text ``around`` tokens to both sides.

        Args:
            position: of the token.
            layer: index in :attr:`layers`.
            around: tokens.
        """
        length = len(self.texts)
        require(0 <= position < length, "position", position, "one of {} tokens", length)
        sources, shares = (x[position].tolist() for x in (self.layers[layer].sources, self.layers[layer].shares))
        found = []
        for source, share in zip(sources, shares, strict=True):
            if source >= 0:
                target = source + self.lookahead
                text = "".join(self.texts[max(0, target - around) : target + around + 1])
                found.append(Source(source, target, share, text))
        return found


@torch.no_grad()
def inspect(
    model: FwPKMForCausalLM,
    text: str | bytes,
    codec: Codec | None = None,
    tokens: int | None = None,
    top: int = 5,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Inspection:
    """Read a text, and split what every token reads from every memory into base and source tokens.

    Args:
        model: with at least one memory.
        text: read from its start.
        codec: of the model's texts; bytes unless given.
        tokens: to read at most; None for all.
        top: sources to keep of each read.
        on_tokens: told after each piece how many tokens were read.

    Raises:
        ValueError: for a text without tokens, or a model without memories.
    """
    require(tokens is None or tokens >= 1, "tokens", tokens, "a positive integer")
    require(top >= 1, "top", top, "a positive integer")
    codec = codec or Codec()
    memories = Session(model, codec).memories  # which keep their log, however long
    known = torch.from_numpy(codec.encode(text.encode() if isinstance(text, str) else text)[:tokens].astype("int64"))
    require(known.numel() >= 1, "text", "empty", "at least one token")
    model.eval()
    cache = FwPKMCache.remembering(model.config, memories)
    likeliest, confidence, probability = [], [], []
    with _recorded(model) as recorded:
        for first in range(0, known.numel(), _PIECE):
            piece = known[first : first + _PIECE + 1].to(model.device)
            logits = model(piece[:_PIECE].unsqueeze(0), cache=cache).logits[0].float()
            chances = logits.softmax(-1)
            best = chances.max(-1)
            confidence.append(best.values)
            likeliest.append(best.indices)
            probability.append(chances[: piece.numel() - 1].gather(1, piece[1:].unsqueeze(1)).squeeze(1))
            on_tokens(logits.shape[0])
    config = model.config.memory_config()
    return Inspection(
        texts=_texts(known.tolist(), codec),
        lookahead=config.lookahead,
        chunk_size=config.chunk_size,
        guesses=_each(torch.cat(likeliest).tolist(), codec),
        confidence=torch.cat(confidence).cpu(),
        probability=torch.cat(probability).cpu(),
        layers=tuple(_layer(i, recorded[i], cache.memories[i].memory, top) for i in sorted(memories)),
    )


def _layer(block: int, calls: list[tuple[Tensor, ...]], state: MemoryState, top: int) -> InspectedLayer:
    """What the memory of a block did, from ``gate, slots, weights, read`` of each call and its state at the end."""
    gates, slots, weights, reads = (torch.cat(parts) for parts in zip(*calls, strict=True))
    seen = seen_by_own_tokens(state)
    strongest = Writes.of(state).strongest(slots, weights, seen, reads, top)
    return InspectedLayer(
        block=block,
        n_slots=state.n_slots,
        gates=gates.cpu(),
        slots=slots.cpu(),
        weights=weights.cpu(),
        base=strongest.base.cpu(),
        sources=strongest.sources.cpu(),
        shares=strongest.shares.cpu(),
        usage=slot_usage(slots, seen, state.n_slots),
        error=strongest.error,
    )


def slot_usage(slots: Tensor, chunks: Tensor, n_slots: int) -> SlotUsage:
    """Of reads of ``slots [T, K]`` by tokens of ``chunks [T]`` (any numbers), out of ``n_slots``."""
    counts = slots.flatten().bincount(minlength=n_slots)
    used = counts[counts > 0].double() / slots.numel()
    return SlotUsage(
        coverage=used.numel() / n_slots,
        collisions=float((reads_of_slot(slots, chunks, n_slots) > 1).double().mean()),  # the host waits once a layer
        divergence=math.log(n_slots) + float((used * used.log()).sum()),
    )


@contextmanager
def _recorded(model: FwPKMForCausalLM) -> Iterator[dict[int, list[tuple[Tensor, ...]]]]:
    """While this lasts: gates ``[T]``, slots and weights ``[T, K]`` and reads ``[T, Dv]`` of each call, by block."""
    calls: dict[int, list[tuple[Tensor, ...]]] = {}

    def record(block: int, result: BlockResult) -> None:
        assert result.memory is not None
        memory = result.memory.memory
        parts = (result.memory.gate, memory.slots, memory.weights, memory.output)
        calls.setdefault(block, []).append(tuple(x[0] for x in parts))

    def hook(block: int) -> Callable[[Any, Any, BlockResult], None]:
        return lambda module, inputs, result: record(block, result)

    handles = [model.model.layers[i].register_forward_hook(hook(i)) for i in model.config.fwpkm_layers or ()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _texts(tokens: list[int], codec: Codec) -> list[str]:
    """What each token adds to the text; the last one also what is left of an unfinished character."""
    decoder = codec.decoder()
    texts = [decoder.decode(token) for token in tokens]
    texts[-1] += decoder.finish()
    return texts


def _each(tokens: list[int], codec: Codec) -> list[str]:
    """The text of each token alone."""
    known = {token: _texts([token], codec)[0] for token in set(tokens)}
    return [known[token] for token in tokens]
