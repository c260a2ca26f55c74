"""Sub-keys that every commit moves: each request has its own, in versions. Nothing here knows vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.memory import MemoryConfig
from fwpkm.ops import key_commit, product_key_address
from fwpkm_vllm.paged import Pages, Versions

TOGETHER = 16  # requests whose own keys are looked at in one go: a copy of them is made


class Part(NamedTuple):
    """Tokens of a step that are addressed together: of each of ``M`` requests the same number, of one chunk.

    Attributes:
        requests: ``[M]``.
        chunks: ``[M]``, the numbers of the chunks, which are those of the versions that are read.
        tokens: ``[M, P]``, which of the step's.
        own: whether the versions are the requests' own, and not version 0.
        completes: whether these tokens are their chunks' last.
    """

    requests: Tensor
    chunks: Tensor
    tokens: Tensor
    own: bool
    completes: bool


def parts(pieces: Iterable[tuple[int, int, int]], chunk_size: int, device: torch.device) -> list[Part]:
    """A step in an order in which each part's keys are there: from what the host knows, without waiting for a GPU.

    Args:
        pieces: of each request, which of the step's tokens is its first, and from where to where it goes.
        chunk_size: of the memories.
        device: where the parts' tensors are to be.
    """
    groups: dict[tuple[int, bool, bool, int], list[tuple[int, int, int]]] = {}
    for request, (first, position, end) in enumerate(pieces):
        start, turn = position, 0
        while position < end:
            chunk = position // chunk_size
            stop = min(end, (chunk + 1) * chunk_size)
            completes = stop == (chunk + 1) * chunk_size
            alike = (turn, chunk > 0, completes, stop - position)
            groups.setdefault(alike, []).append((request, chunk, first + position - start))
            position, turn = stop, turn + 1
    made = []
    for (_, own, completes, length), members in sorted(groups.items()):
        most = TOGETHER if own or completes else len(members)
        for i in range(0, len(members), most):
            numbers = torch.tensor(members[i : i + most], pin_memory=device.type == "cuda")
            requests, chunks, first_token = numbers.to(device, non_blocking=True).unbind(1)
            tokens = first_token.unsqueeze(1) + torch.arange(length, device=device)
            made.append(Part(requests, chunks, tokens, own, completes))
    return made


@dataclass(frozen=True)
class MovingKeys:
    """The sub-keys of each request: version ``v`` is what the commits of its first ``v`` chunks have made of them.

    Attributes:
        versions: the sub-keys, one a row; a stretch is a chunk.
        open: the queries of each request's open chunk, which its commit needs.
        parts: the step's tokens.
    """

    versions: Versions
    open: Pages
    parts: Sequence[Part]

    def address(self, query: Tensor, keys: Tensor, config: MemoryConfig) -> tuple[Tensor, Tensor]:
        """Scores and slots, ``[T, H, k]``, for ``query [T, H, Dk]``, and the versions that the step makes.

        ``keys [H, 2, n, Dk/2]`` are those of version 0, which every request starts from.
        """
        self.open.write("queries", query.flatten(1))
        scores = keys.new_zeros(*query.shape[:2], config.topk)
        slots = torch.zeros_like(scores, dtype=torch.int64)
        for part in self.parts:
            own = keys.unsqueeze(0)
            if part.own:
                rows = keys.shape[:3].numel()
                own = self.versions.get(part.requests, part.chunks, rows).unflatten(1, keys.shape[:3])
            asked = self._chunk(part, query, config) if part.completes else query[part.tokens]
            found = product_key_address(asked, own, config.topk, config.score, config.score_eps)
            scores[part.tokens], slots[part.tokens] = (x[:, -part.tokens.shape[1] :] for x in found[:2])
            if part.completes:
                rate = config.learning_rate * config.addressing_weight
                moved = key_commit(asked, own, found[2], found[3], None, rate, config.score)
                self.versions.put(part.requests, part.chunks + 1, moved.flatten(1, 3))
        return scores, slots

    def _chunk(self, part: Part, query: Tensor, config: MemoryConfig) -> Tensor:
        """All queries ``[M, C, H, Dk]`` of the chunks that a part completes, those of earlier steps included."""
        position = torch.arange(config.chunk_size, device=query.device)
        position = part.chunks.unsqueeze(1) * config.chunk_size + position
        return self.open.read("queries", part.requests.unsqueeze(1), position).unflatten(-1, query.shape[1:])
