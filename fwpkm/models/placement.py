"""Where tokens stand: which of them are real, at which positions, where sequences begin, and who attends to whom."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from fwpkm.checks import require, require_dtype, require_shape
from fwpkm.layers.host import CACHE
from fwpkm.models.configuration import FwPKMConfig

ATTENTION = ("full_attention", "sliding_attention")


class Placement(NamedTuple):
    """Where the ``T`` tokens of a call stand, after ``S - T`` earlier ones."""

    positions: Tensor  # [B or 1, T]
    attention_mask: Tensor | None  # [B, S] bool, None if all tokens are real
    mask: Tensor | None  # [B, T] bool, the part of attention_mask that is about these tokens
    starts: Tensor | None  # [B, T] bool, where a sequence begins inside a row, None if nowhere


def place(
    hidden: Tensor, past: int, attention_mask: Tensor | None, position_ids: Tensor | None, cached: bool
) -> Placement:
    """What ``attention_mask`` and ``position_ids`` say about where tokens stand.

    Args:
        hidden: ``[B, T, D]``, the tokens' embeddings.
        past: how many tokens of each row came in earlier calls.
        attention_mask: ``[B, past + T]``, nonzero at real tokens, or None.
        position_ids: ``[B or 1, T]``, or None for those that count the real tokens of a row. Within a row they count up
            by one; where they do not, another sequence begins.
        cached: whether the tokens go to a cache.

    Raises:
        ValueError: for a wrong shape or dtype, or rows of several sequences together with a mask or a cache. (In a
            compiled graph, which cannot look, the latter passes.)
    """
    (batch, length), device = hidden.shape[:2], hidden.device
    looks = device.type == "cpu" and not torch.compiler.is_compiling()  # where that costs nothing
    mask = None
    if attention_mask is not None:
        require_shape("attention_mask", attention_mask, (batch, past + length))
        attention_mask = attention_mask.to(device, torch.bool)
        if looks and attention_mask.all():
            attention_mask = None
        else:
            mask = attention_mask[:, past:]
    if position_ids is None:
        if attention_mask is None:
            positions = torch.arange(past, past + length, device=device).unsqueeze(0)
        else:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        return Placement(positions, attention_mask, mask, None)

    require_shape("position_ids", position_ids, ("B", length))
    require(position_ids.shape[0] in (1, batch), "position_ids.shape[0]", position_ids.shape[0], "1 or {}", batch)
    require_dtype("position_ids", position_ids, torch.int64, torch.int32)
    positions = position_ids.to(device)
    starts = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    if mask is not None:  # positions of masked tokens say nothing
        starts = starts & mask & pad(mask[:, :-1], (1, 0))
    alone = mask is None and not cached
    if length == 1 or not (starts.any() if looks else alone):
        return Placement(positions, attention_mask, mask, None)
    require(
        alone,
        "position_ids",
        "not counting up by one",
        "one sequence a row where attention_mask or a cache is given; several in a row take neither",
    )
    return Placement(positions, attention_mask, mask, starts.expand(batch, -1))


def attention_masks(config: FwPKMConfig, hidden: Tensor, cache: Any, placement: Placement) -> dict[str, Tensor | None]:
    """The mask of each kind of attention in ``config.layer_types``, in the form of its attention implementation."""
    if hidden.is_meta:  # transformers looks at masks and positions: at those on which its masks depend most
        seen = Placement(*(None if x is None else torch.zeros_like(x, device="cpu") for x in placement))  # type: ignore[arg-type]
        masks = attention_masks(config, hidden.new_zeros(1, device="cpu").expand(hidden.shape), cache, seen)
        return {kind: None if mask is None else mask.to(hidden.device) for kind, mask in masks.items()}
    layer_types = config.layer_types or []
    return {
        kind: _attention_mask(config, kind, hidden, cache, placement, layer_types.index(kind))
        for kind in ATTENTION
        if kind in layer_types
    }


def _attention_mask(
    config: FwPKMConfig, kind: str, hidden: Tensor, cache: Any, placement: Placement, layer: int
) -> Tensor | None:
    """The mask of the attentions like that of ``layer``, whose cache its size is taken from."""
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": hidden,
        "attention_mask": placement.attention_mask,
        CACHE: cache,
        # Looked at only for where sequences begin: a compiled graph, which cannot look, would always get a mask.
        "position_ids": None if placement.starts is None else placement.positions,
        "layer_idx": layer,
    }
    window = config.sliding_window
    if kind == "full_attention" or window is None:
        return create_causal_mask(**arguments)
    if placement.attention_mask is None:
        return create_sliding_window_causal_mask(**arguments)
    # A window counts real tokens, wherever they stand. As tensors: a graph for many lengths takes no mask function.
    mask = create_causal_mask(**arguments, allow_is_causal_skip=False)
    read = placement.attention_mask.cumsum(1)
    first = read.shape[1] - mask.shape[-1]  # the first key that the layer keeps
    near = read[:, None, -hidden.shape[1] :, None] - read[:, None, None, first:] < window
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)
