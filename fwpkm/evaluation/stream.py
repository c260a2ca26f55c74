"""Reading long texts through a cache, a call at a time: what all evaluations do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.evaluation.memory import restart
from fwpkm.models import FwPKMCache, FwPKMForCausalLM, FwPKMOutput

OnTokens = Callable[[int], None]  # told after each call how many tokens were read


def ignored(count: int) -> None:
    """Nobody wants to know."""


@torch.no_grad()
def stream(
    model: FwPKMForCausalLM,
    tokens: Tensor,
    call: int,
    on_tokens: OnTokens = ignored,
    resets: Collection[int] = (),
) -> Iterator[tuple[slice, FwPKMOutput]]:
    """Read ``tokens [B, T]``, at most ``call`` of a row at a time: which columns, and what the model gave for them.

    Args:
        model: is put into evaluation.
        tokens: of any integer dtype.
        call: columns.
        on_tokens: told after each call how many tokens were read.
        resets: columns before which all memories return to the base values.
    """
    require(call >= 1, "call", call, "a positive integer")
    model.eval()
    cache = FwPKMCache(model.config)
    length = tokens.shape[1]
    cuts = sorted({*range(0, length, call), *(at for at in resets if 0 <= at < length), length})
    for first, last in pairwise(cuts):
        if first in resets:
            restart(cache)
        piece = tokens[:, first:last].to(model.device, torch.int64)
        yield slice(first, last), model(piece, cache=cache, output_memories=True)
        on_tokens(piece.numel())
