"""What pages hold, as tensors: records of tokens, and versions of dense rows. Nothing here knows vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """Records of one kind in pages.

    Attributes:
        fields: ``[blocks, page, width]`` of each field.
        table: ``[R, B]``, the blocks of each request in their order; what lies outside a request's tokens (or a
            window of them) may be anything.
        places: ``[T]``, where the records of the step's tokens go, ``block * page + offset``. Block 0 belongs to
            nobody: what is to go nowhere goes there.
    """

    fields: dict[str, Tensor]
    table: Tensor
    places: Tensor

    def write(self, name: str, new: Tensor, which: Tensor | None = None) -> None:
        """Write ``new [T, width]`` into the records of the step's tokens, or of those ``which``."""
        field = self.fields[name]
        page = field.shape[1]
        places = self.places if which is None else torch.where(which, self.places, 0)
        field.index_put_((places // page, places % page), new.to(field.dtype))

    def read(self, name: str, requests: Tensor, positions: Tensor) -> Tensor:
        """``[..., width]`` at ``positions`` of ``requests``; anything at a negative position."""
        field = self.fields[name]
        page = field.shape[1]
        positions = positions.clamp_min(0)
        return field[self.table[requests, positions // page].long(), positions % page]

    def from_blocks(self, first: Tensor, width: int) -> Tensor:
        """``[R, width]``, the blocks of each request from its ``first [R]`` on; anything beyond the last."""
        columns = first.unsqueeze(1) + torch.arange(width, device=first.device)
        return self.table.gather(1, columns.clamp_max(self.table.shape[1] - 1))


@dataclass(frozen=True)
class Versions:
    """Dense rows of requests in pages: a version after each stretch of so many tokens.

    Version ``v`` is a function of a request's first ``v`` stretches, made in the step that completes the last of them,
    and never rewritten. There are no pages of version 0: it is the same for everybody.

    Attributes:
        rows: ``[blocks, page, width]``, row ``s`` of a version in row ``s % page`` of its page ``s // page``.
        table: ``[R, B]``, the blocks of each request: those of version 1, of version 2, ...; only those of the version
            that a request reads, and of what it makes, have to be its own.
        pages: blocks of a version.
    """

    rows: Tensor
    table: Tensor
    pages: int

    def places(self, requests: Tensor, versions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Block and place in it of ``rows [M, S]`` of the ``versions [M]`` of ``requests [M]``."""
        page = self.rows.shape[1]
        column = (versions - 1).unsqueeze(1) * self.pages + rows // page
        return self.table[requests.unsqueeze(1), column].long(), rows % page

    def get(self, requests: Tensor, versions: Tensor, count: int) -> Tensor:
        """``[M, count, width]``, the first rows of the ``versions [M]`` of ``requests [M]``."""
        rows = torch.arange(count, device=requests.device).expand(len(requests), -1)
        return self.rows[self.places(requests, versions, rows)]

    def put(self, requests: Tensor, versions: Tensor, new: Tensor) -> None:
        """Write the first rows of ``versions``, ``[M, count, width]``."""
        rows = torch.arange(new.shape[1], device=requests.device).expand(len(requests), -1)
        self.rows.index_put_(self.places(requests, versions, rows), new)
