"""Requests whose write logs lie in pages, as a server keeps them, and what a token of theirs reads, by plain loops."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm import ops
from fwpkm.ops import PagedLog
from tests.draws import Draw


class Requests(NamedTuple):
    """Arguments of ``log_read``, and the records of each request, in order, that the pages hold."""

    arguments: dict[str, Any]
    records: list[tuple[Tensor, Tensor, Tensor]]  # slots [R, K], coefficients [R, K], residuals [R, Dv]

    def read(self, **others: Any) -> Tensor:
        return ops.log_read(**self.arguments | others)

    def to(self, device: str) -> Requests:
        """The same with arguments on ``device``, pages in a buffer of their own again."""
        moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in self.arguments.items()}
        slots, coefficients, residuals = pages = self.arguments["pages"]
        dtypes = slots.dtype, coefficients.dtype, residuals.dtype
        moved["pages"] = empty_pages(*slots.shape, residuals.shape[2], *dtypes, device)
        for mine, field in zip(moved["pages"], pages, strict=True):
            mine.copy_(field)
        return self._replace(arguments=moved)


def empty_pages(
    blocks: int,
    page: int,
    fanout: int,
    width: int,
    slots: torch.dtype,
    floats: torch.dtype,
    residuals: torch.dtype,
    device: str = "cpu",
) -> PagedLog:
    """Pages of one layer of two in a buffer of bytes, a record's fields side by side at multiples of 8 bytes. Stale:
    every slot is 0, every number NaN.
    """
    shapes = (fanout, slots), (fanout, floats), (width, residuals)
    sizes = [-(-n * dtype.itemsize // 8) * 8 for n, dtype in shapes]
    buffer = torch.zeros(blocks, 2, page, sum(sizes), dtype=torch.uint8, device=device)
    fields, first = [], 0
    for (n, dtype), size in zip(shapes, sizes, strict=True):
        fields.append(buffer[:, 1, :, first : first + n * dtype.itemsize].view(dtype))
        first += size
    log = PagedLog(*fields)
    log.coefficients.fill_(torch.nan)
    log.residuals.fill_(torch.nan)
    return log


def boundaries(records: int, chunk_size: int, origin: int) -> list[int]:
    """Where chunks of a request end, up to ``records``."""
    before = [*range(0, origin, chunk_size), origin]
    return [x for x in (*before, *range(origin + chunk_size, records + 1, chunk_size)) if x <= records]


def draw_requests(
    draw: Draw,
    lengths: list[int],
    tokens: int,
    *,
    n: int = 6,
    fanout: int = 3,
    width: int = 5,
    page: int = 4,
    chunk_size: int = 3,
    lookahead: int = 1,
    origins: list[int] | None = None,
    slot_dtype: torch.dtype = torch.int32,
    residual_dtype: torch.dtype | None = None,
    spare: int = 2,
    anywhere: bool = False,
) -> Requests:
    """Requests with ``lengths`` records each, on pages in any order between ``spare`` stale ones, and tokens that read
    any of them after any of its chunks, or ``anywhere``. Some tokens are padding. What must not be touched is NaN or
    out of range.
    """
    needed = [-(-length // page) for length in lengths]
    blocks = sum(needed) + spare
    pages = empty_pages(blocks, page, fanout, width, slot_dtype, draw.dtype, residual_dtype or draw.dtype)
    own = torch.randperm(blocks, generator=draw.generator)[: sum(needed)].split(needed)
    table = torch.full((len(lengths), max(needed, default=0) + 1), 1 << 30, dtype=torch.int32)
    records = []
    for request, length in enumerate(lengths):
        table[request, : needed[request]] = own[request]
        fields = draw.integers(n + 1, length, fanout) - 1, draw.normal(length, fanout), draw.normal(length, width)
        for mine, field in zip(pages, fields, strict=True):
            for t in range(length):
                mine[own[request][t // page], t % page] = field[t]
        records.append((*fields[:2], fields[2].to(pages.residuals.dtype)))

    requests = draw.integers(len(lengths) + 1, tokens) - 1
    committed = torch.full((tokens,), 1 << 40)
    slots, weights = draw.integers(n, tokens, fanout), draw.normal(tokens, fanout)
    for t, request in enumerate(requests.tolist()):
        if request >= 0:
            ends = boundaries(lengths[request], chunk_size, origins[request] if origins else 0)
            ends = list(range(lengths[request] + 1)) if anywhere else ends
            committed[t] = ends[int(draw.integers(len(ends)))]
        else:
            slots[t], weights[t] = 1 << 40, torch.nan
    arguments = {
        "values": draw.normal(n, width),
        "slots": slots,
        "weights": weights,
        "pages": pages,
        "block_table": table,
        "requests": requests,
        "lengths": committed,
        "chunk_size": chunk_size,
        "lookahead": lookahead,
        "origins": None if origins is None else torch.tensor(origins, dtype=torch.int64),
    }
    return Requests(arguments, records)


def plain_read(requests: Requests) -> Tensor:
    """``[T, Dv]`` in float64, record by record, from the requests' own records and not from pages."""
    a = requests.arguments
    values, slots, weights = a["values"].double(), a["slots"], a["weights"].double()
    out = torch.zeros(slots.shape[0], values.shape[1], dtype=torch.float64)
    for t, request in enumerate(a["requests"].tolist()):
        if request < 0:
            continue
        length = int(a["lengths"][t])
        origin = 0 if a["origins"] is None else int(a["origins"][request])
        chunks = []
        while len(chunks) < length:  # from one boundary to the next
            start = len(chunks)
            end = min(start + a["chunk_size"], length)
            end = min(end, origin) if start < origin else end
            chunks += [start] * (end - start)
        logged, coefficients, residuals = (x[:length] for x in requests.records[request])
        counts = Counter((chunks[u], s) for u in range(length) for s in logged[u].tolist())
        version = values.clone()
        for u in range(length - a["lookahead"]):
            if chunks[u + a["lookahead"]] == chunks[u]:
                for s, coefficient in zip(logged[u].tolist(), coefficients[u].double(), strict=True):
                    if s >= 0:
                        version[s] += coefficient / counts[chunks[u], s] * residuals[u + a["lookahead"]].double()
        out[t] = weights[t] @ version[slots[t]]
    return out
