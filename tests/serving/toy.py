"""A toy server: requests, pages of records, an allocator, shared prefixes; vLLM's part in a hundred lines.

Everything that nobody may read is poison: free pages, blocks' unused places, the entries of block tables outside a
request's tokens.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from fwpkm_vllm.folded import Folded
from fwpkm_vllm.keys import MovingKeys, parts
from fwpkm_vllm.paged import Pages, Versions
from fwpkm_vllm.records import Layout, log_layout, query_layout, recent_layout, row_layout, stretch, window
from fwpkm_vllm.step import Batch, Step, serve
from torch import Tensor

from fwpkm.layers import FwPKM
from fwpkm.memory import MemoryConfig
from fwpkm.models import FwPKMConfig
from fwpkm.ops import key_commit, product_key_address
from tests.rounding import by_token, following

LIMIT = 8  # of the log of a request, in tokens, where logs are folded
NOBODY = 0  # the block that padding is written to


@dataclass
class Request:
    """Somebody who has a document read, from its first token to the last that was asked for."""

    document: int
    length: int
    origin: int = 0  # where its memory commits early
    computed: int = 0
    scheduled: int = 0  # with the step that it has pages for
    blocks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    residuals: list[Tensor] = field(default_factory=list)  # of its records, of each step


class Pool:
    """Blocks of records of one kind: who holds them, and where prefixes of documents can be found."""

    def __init__(self, layout: Layout, page: int, blocks: int) -> None:
        self.page = page
        self.bytes = torch.empty(blocks, page, layout.nbytes, dtype=torch.uint8)
        self.fields = layout.views(self.bytes)
        self.free = list(range(blocks - 1, NOBODY, -1))
        self.holders = [0] * blocks
        self.poison(range(blocks))

    def poison(self, blocks: Sequence[int] | range) -> None:
        for block in blocks:
            for x in self.fields.values():
                x[block] = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max

    def take(self) -> int:
        block = self.free.pop()
        self.holders[block] = 1
        return block

    def give_back(self, block: int) -> None:
        if block == NOBODY:
            return
        self.holders[block] -= 1
        if not self.holders[block]:
            self.poison([block])
            self.free.insert(len(self.free) // 2, block)  # neither the first nor the last to be taken again


class Server:
    """One memory layer that serves requests for ``documents [T, D]``; with ``rows`` a page, logs are folded.

    If its keys move they have pages of ``key_rows``, and queries pages of ``recent_page``.
    """

    def __init__(
        self,
        layer: FwPKM,
        documents: Sequence[Tensor],
        log_page: int,
        recent_page: int,
        rows: int | None = None,
        key_rows: int = 4,
        *,
        blocks: int,
    ) -> None:
        self.layer, self.documents = layer, documents
        memory = layer.config
        config = FwPKMConfig(
            hidden_size=layer.query.in_features,
            fwpkm_value_dim=layer.values.shape[1],
            fwpkm_key_dim=2 * layer.keys.shape[-1],
            fwpkm_heads=layer.heads,
            fwpkm_query_conv=0 if layer.query_conv is None else layer.query_conv.width,
            **{f"fwpkm_{field.name}": getattr(memory, field.name) for field in dataclasses.fields(memory)},
        )
        dtype = layer.query.weight.dtype
        layouts = {"log": log_layout(config), "recent": recent_layout(config, dtype)}
        pages = {"log": log_page, "recent": recent_page}
        self.stretch = None
        self.versions = {}  # their stretch, and pages of one
        if rows is not None:
            layouts["folded"], pages["folded"] = row_layout(layer.values.shape[1]), rows
            self.stretch = stretch(LIMIT, memory.chunk_size, log_page, recent_page)
            self.versions["folded"] = self.stretch, -(-layer.values.shape[0] // rows)
        if memory.key_update == "fast":
            layouts["keys"], pages["keys"] = row_layout(layer.keys.shape[-1]), key_rows
            layouts["queries"], pages["queries"] = query_layout(config, dtype), recent_page
            self.versions["keys"] = memory.chunk_size, -(-layer.keys.shape[:-1].numel() // key_rows)
        self.pools = {kind: Pool(layouts[kind], pages[kind], blocks) for kind in layouts}
        self.window = window(config)
        self.requests: list[Request] = []

    def add(self, document: int, length: int, origin: int = 0, shares: bool = False) -> Request:
        """A request; one that ``shares`` starts from as much of its prefix as is found in pages of others."""
        request = Request(document, length, origin)
        if shares:
            self.share(request)
        self.requests.append(request)
        return request

    def share(self, request: Request) -> None:
        """Use pages of others, each kind from whom has it, as far as they are full and the last window is there."""
        pages = [self.pools[kind].page for kind in self.pools if kind not in self.versions]
        for tokens in range(request.length - 1, 0, -1):
            if any(tokens % page for page in pages):
                continue
            sources = [other for other in self.requests if self.finds(request, other, tokens)]
            needed = {kind: self.needed(kind, tokens) for kind in self.pools}
            found = {
                kind: [other for other in sources if all(other.blocks[kind][i] != NOBODY for i in needed[kind])]
                for kind in self.pools
            }
            if all(found.values()):
                break
        else:
            return
        request.computed = tokens
        for kind, pool in self.pools.items():
            row = found[kind][-1].blocks[kind][: needed[kind].stop]
            request.blocks[kind] = [block if i in needed[kind] else NOBODY for i, block in enumerate(row)]
            for block in request.blocks[kind]:
                pool.holders[block] += block != NOBODY

    def finds(self, request: Request, other: Request, tokens: int) -> bool:
        """Whether the first ``tokens`` of a request are those of another, and offered."""
        mine, theirs = self.documents[request.document][:tokens], self.documents[other.document][:tokens]
        return request.origin == other.origin and tokens <= self.offered(other) and torch.equal(mine, theirs)

    def offered(self, other: Request) -> int:
        """Of how many tokens a request's pages are offered: of those that steps before have written."""
        return other.computed

    @property
    def longest_piece(self) -> int:
        """A step may complete one stretch, not more."""
        return self.stretch or 1 << 30

    def needed(self, kind: str, computed: int) -> range:
        """Of a request's pages of a kind, those that its next token needs."""
        page = self.pools[kind].page
        if kind in self.versions:
            length, pages = self.versions[kind]
            return range(max(0, computed // length - 1) * pages, computed // length * pages)
        if kind == "recent":
            first = max(0, computed - self.window + 1)
        else:
            length = self.stretch if kind == "log" else self.layer.config.chunk_size
            first = computed // length * length if length else 0
        return range(first // page, -(-computed // page))

    def allocate(self, request: Request, tokens: int) -> bool:
        """Pages for that many more tokens; what is not needed any more is given back. False if there are not enough."""
        for kind, pool in self.pools.items():
            for i in range(min(len(request.blocks[kind]), self.needed(kind, request.computed).start)):
                pool.give_back(request.blocks[kind][i])
                request.blocks[kind][i] = NOBODY
        missing = {k: self.needed(k, request.computed + tokens).stop - len(request.blocks[k]) for k in self.pools}
        if any(missing[kind] > len(pool.free) for kind, pool in self.pools.items()):
            return False
        for kind, pool in self.pools.items():
            request.blocks[kind] += [pool.take() for _ in range(missing[kind])]
        request.scheduled = request.computed + tokens
        return True

    def release(self, request: Request) -> None:
        for kind, pool in self.pools.items():
            for block in request.blocks[kind]:
                pool.give_back(block)
            request.blocks[kind] = []

    def preempt(self, request: Request) -> None:
        self.release(request)
        request.computed, request.scheduled, request.residuals = 0, 0, []

    def remove(self, request: Request) -> None:
        self.release(request)
        self.requests.remove(request)

    def step(
        self, pieces: Sequence[tuple[Request, int]], padding: int = 0, change: Callable[[Step], Step] | None = None
    ) -> list[Tensor]:
        """Read the next so many tokens of requests, which have their pages; ``padding`` tokens follow."""
        assert all(count <= self.longest_piece for _, count in pieces)
        counts = torch.tensor([count for _, count in pieces])
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        lengths = torch.tensor([request.computed + count for request, count in pieces])
        origins = torch.tensor([request.origin for request, _ in pieces])
        hidden = [self.documents[r.document][r.computed : r.computed + count] for r, count in pieces]
        hidden.append(hidden[0].new_full((padding, hidden[0].shape[1]), 0.5))
        total = int(counts.sum()) + padding
        batch = Batch.of(starts, lengths, total, int(counts.max()), origins if bool(origins.any()) else None)
        tables, pages = {}, {}
        for kind in self.pools:
            width = max(len(request.blocks[kind]) for request, _ in pieces) + 2
            nothing = torch.iinfo(torch.int32).max
            table = tables[kind] = torch.full((len(pieces), width), nothing, dtype=torch.int32)
            for i, (request, _) in enumerate(pieces):
                blocks = torch.tensor(request.blocks[kind], dtype=torch.int32)
                table[i, : len(blocks)] = blocks if kind == "recent" else blocks.masked_fill(blocks == NOBODY, nothing)
        for kind in self.pools.keys() - self.versions.keys():
            page, places = self.pools[kind].page, []
            for i, (request, count) in enumerate(pieces):
                at = torch.arange(request.computed, request.computed + count)
                places.append(tables[kind][i, at // page].long() * page + at % page)
            places.append(torch.zeros(padding, dtype=torch.int64))
            pages[kind] = Pages(self.pools[kind].fields, tables[kind], torch.cat(places))
        rows = {
            kind: Versions(self.pools[kind].fields["rows"], tables[kind], count)
            for kind, (_, count) in self.versions.items()
        }
        folded = keys = None
        if self.stretch:
            versions = [((r.computed + count) // self.stretch, r.computed // self.stretch) for r, count in pieces]
            due = [(i, version) for i, (version, before) in enumerate(versions) if version > before]
            folded = Folded(rows["folded"], self.stretch, due)
        if "keys" in rows:
            spans = [(int(first), r.computed, r.computed + n) for first, (r, n) in zip(starts, pieces, strict=False)]
            together = parts(spans, self.layer.config.chunk_size, starts.device)
            keys = MovingKeys(rows["keys"], pages["queries"], together)
        step = Step(batch, pages["log"], pages["recent"], folded, keys)
        with torch.no_grad():
            out = serve(self.layer, torch.cat(hidden), change(step) if change else step)
        own = slice(0, total - padding)
        written = pages["log"].read("residuals", batch.owners[own], batch.positions[own]).float()
        for (request, count), residuals in zip(pieces, written.split(counts.tolist()), strict=True):
            request.computed += count
            request.residuals.append(residuals)
        return list(out[: total - padding].split(counts.tolist()))


def memory_layer(seed: int, query_conv: int = 0, heads: int = 1, **fields: object) -> FwPKM:
    """A small layer whose keys stay where they are unless told otherwise, and whose memory matters."""
    torch.manual_seed(seed)
    config = MemoryConfig(**{"topk": 3, "key_update": "train_only"} | fields)  # type: ignore[arg-type]
    layer = FwPKM(10, n_subkeys=5, key_dim=6, value_dim=7, heads=heads, query_conv=query_conv, config=config).eval()
    with torch.no_grad():
        layer.gate.bias += 1
        layer.output.weight *= 4
    return layer


def margin(layer: FwPKM, document: Tensor) -> float:
    """How far the last slot that a token of ``document`` takes is from the first that it leaves, at the least.

    With keys that move also the last sub-key, which the key commits are computed from.
    """
    least, config = torch.inf, layer.config
    with torch.no_grad():
        x = layer._inputs(document.unsqueeze(0), None, None, None)[0]
        keys = layer.keys.unsqueeze(0)
        for query in layer.query(x).unflatten(-1, (layer.heads, -1)).split(config.chunk_size, 1):
            scores, _, sub_scores, _ = product_key_address(query, keys, keys.shape[3], config.score)
            if config.key_update == "fast":
                found = product_key_address(query, keys, config.topk, config.score)
                if query.shape[1] == config.chunk_size:
                    keys = key_commit(query, keys, *found[2:], None, config.learning_rate, config.score)
                scores = torch.cat((scores, sub_scores.flatten(2, 3)), 2)
            least = min(least, float((scores[..., config.topk - 1] - scores[..., config.topk]).min()))
    return least


def documents(layer: FwPKM, seed: int, count: int, length: int, common: Sequence[int] = ()) -> list[Tensor]:
    """Random documents without near ties; the ``i``-th begins with ``common[i]`` tokens of the first."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < count:
        document = torch.randn(length, layer.query.in_features, generator=generator)
        if found and common:
            document[: common[len(found)]] = found[0][: common[len(found)]]
        if margin(layer, document) > 1e-4:
            found.append(document)
    return found


def alone(layer: FwPKM, document: Tensor, origin: int = 0, request: Request | None = None) -> Tensor:
    """What :class:`FwPKM` itself gives for ``document``, with an early commit at ``origin``.

    With a log in half precision it goes on with the records of a ``request``, having checked them, if one is given.
    """
    with torch.no_grad():
        if not origin:
            if request is None or layer.config.log_dtype == "float32":
                return layer(document.unsqueeze(0))[0][0]
            records = by_token(torch.cat(request.residuals), layer.config.lookahead)
            with following([records.unsqueeze(0)]):
                return layer(document.unsqueeze(0))[0][0]
        assert layer.config.log_dtype == "float32", "early commits are not followed"
        first, state, *_ = layer(document[None, :origin])
        rest = layer(document[None, origin:], state._replace(memory=state.memory.flush())).hidden
        return torch.cat((first, rest), 1)[0]
