"""What the memories of requests are kept as: records of bytes in pages, seen through typed views."""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.memory.formulas import residual_dtype
from fwpkm.models import FwPKMConfig


class Field(NamedTuple):
    """A part of a record: ``width`` numbers of a dtype."""

    name: str
    dtype: torch.dtype
    width: int

    @property
    def nbytes(self) -> int:
        return self.width * self.dtype.itemsize


class Layout:
    """The fields of a record, one after the other, the widest numbers first so that each is aligned."""

    def __init__(self, *fields: Field) -> None:
        self.fields = sorted(fields, key=lambda field: -field.dtype.itemsize)
        used = sum(field.nbytes for field in fields)
        widest = max(field.dtype.itemsize for field in fields)
        self.nbytes = -(-used // widest) * widest

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """Bytes ``[blocks, page, nbytes]`` as ``[blocks, page, width]`` of each field; nothing is copied."""
        views, start = {}, 0
        for field in self.fields:
            views[field.name] = pages[..., start : start + field.nbytes].view(field.dtype)
            start += field.nbytes
        return views


def log_layout(config: FwPKMConfig) -> Layout:
    """A record of the write log (docs/design.md, section 3): it is kept as long as the request.

    ``slots`` and ``coefficients`` of a token (the latter before the division by ``N_s``), and the residual of the
    token ``lookahead`` before it.
    """
    fanout = config.fwpkm_heads * config.fwpkm_topk
    residuals = residual_dtype(config.memory_config(), training=False) or torch.float32
    return Layout(
        Field("slots", torch.int32, fanout),
        Field("coefficients", torch.float32, fanout),
        Field("residuals", residuals, config.fwpkm_value_dim),
    )


def recent_layout(config: FwPKMConfig, dtype: torch.dtype) -> Layout:
    """What only the next few tokens need: a token's read and its gate, and what the convolution sees of it."""
    fields = [Field("reads", torch.float32, config.fwpkm_value_dim), Field("gates", torch.float32, 1)]
    if config.fwpkm_query_conv > 1:
        fields.append(Field("inputs", dtype, config.hidden_size))
    return Layout(*fields)


def row_layout(width: int) -> Layout:
    """A row that requests have of their own: what a log has added to a slot, or a sub-key that commits have moved."""
    return Layout(Field("rows", torch.float32, width))


def query_layout(config: FwPKMConfig, dtype: torch.dtype) -> Layout:
    """What the key commit needs of a token, until its chunk is committed."""
    return Layout(Field("queries", dtype, config.fwpkm_heads * config.fwpkm_key_dim))


def window(config: FwPKMConfig) -> int:
    """How many tokens, itself included, a token needs recent records of."""
    return max(config.fwpkm_lookahead + 1, config.fwpkm_query_conv)


MOST = 8  # times the tokens of a block: prefixes are shared in whole pages


def tokens_per_page(page_bytes: int, record_bytes: int, tokens: int) -> int:
    """How many records a page of ``page_bytes`` holds: :data:`MOST` times ``tokens`` or less, or that halved until it
    fits; what is left of a page is padding.
    """
    fit = page_bytes // record_bytes
    while tokens > max(1, fit) and tokens % 2 == 0:
        tokens //= 2
    return tokens * min(MOST, max(1, fit // tokens))


def tokens_beside_log(page_bytes: int, record_bytes: int, tokens: int, config: FwPKMConfig) -> int:
    """The same of records of any kind: as many as the log's or a whole fraction of that, so that prefixes, which are
    shared where pages of all kinds end, are shared wherever those of the log end.
    """
    log = tokens_per_page(page_bytes, log_layout(config).nbytes, tokens)
    unit = min(tokens, log)
    held = tokens_per_page(page_bytes, record_bytes, unit)
    while log % held:
        held -= unit
    return held


def stretch(limit: int, *sizes: int) -> int:
    """The tokens after which records are added up: the first from ``limit`` on where chunks and blocks end."""
    step = lcm(*sizes)
    return -(-limit // step) * step
