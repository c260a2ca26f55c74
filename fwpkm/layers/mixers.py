"""Token mixers: transformers' attention, full or sliding-window, the latter in time proportional to the window; and the
layers of flash-linear-attention.

Importing this module registers the attention implementation ``"windowed_sdpa"`` with transformers: ``"sdpa"``, except
that an unpadded sliding window is computed block by block instead of as a mask over the whole context.
"""

from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fwpkm.checks import require

WINDOWED = "windowed_sdpa"
FLASH_LINEAR = "fla:"  # how a layer type that names a layer of flash-linear-attention begins


def windowed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``[B, heads, T, d]`` in, ``[B, T, heads, d]`` out."""
    if sliding_window is None or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    out = sliding_window_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), sliding_window, kwargs.get("scaling")
    )
    return out.transpose(1, 2).contiguous(), None


def windowed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: no mask where :func:`sliding_window_attention` needs none."""
    unpadded = kwargs.get("attention_mask") is None and kwargs.get("allow_is_causal_skip", True)
    if kwargs.get("local_size") is not None and unpadded:
        return None
    return sdpa_mask(*args, **kwargs)


def sliding_window_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float | None) -> Tensor:
    """Causal attention of each token to itself and the ``window - 1`` tokens before it.

    Args:
        query: ``[B, heads, T, d]``, the last ``T`` tokens.
        key, value: ``[B, heads, S, d]``, ``S >= T`` tokens up to the same last one.

    Returns:
        ``[B, heads, T, d]``, in blocks of ``window`` queries against ``2 * window`` keys.
    """
    batch, heads, length, _ = query.shape
    past = key.shape[2] - length
    if length == 1:
        return scaled_dot_product_attention(query, key[:, :, -window:], value[:, :, -window:], scale=scale)
    blocks = -(-length // window)
    tail = blocks * window - length
    # Contiguous: what pads by nothing keeps strides that a graph made for other lengths does not expect.
    query = pad(query.contiguous(), (0, 0, 0, tail)).unflatten(2, (blocks, window))
    # Block i sees the keys of its own window and of the one before: positions (i - 1) * window to (i + 1) * window - 1.
    # Blocks stand where heads usually do, and heads with the batch: [B * heads, blocks, 2 * window, d] has the four
    # dimensions that fused kernels take.
    known = min(past, window)
    seen = (x[:, :, past - known :].contiguous() for x in (key, value))
    windows = (pad(x, (0, 0, window - known, tail)).unflatten(2, (blocks + 1, window)) for x in seen)
    key, value = (torch.cat((x[:, :, :-1], x[:, :, 1:]), 3).flatten(0, 1) for x in windows)
    row, column = torch.arange(window, device=query.device)[:, None], torch.arange(2 * window, device=query.device)
    visible = (column > row) & (column <= row + window)
    exists = torch.arange(blocks, device=query.device)[:, None] * window + column >= window - known
    mask = visible & exists[:, None, :]
    out = scaled_dot_product_attention(query.flatten(0, 1), key, value, attn_mask=mask.unsqueeze(0), scale=scale)
    return out.unflatten(0, (batch, heads)).flatten(2, 3)[:, :, :length]


class FlashLinearAttention(nn.Module):
    """A layer of flash-linear-attention, by its name in ``fla.layers``. Its kernels need a GPU.

    It reads whole sequences, one a row, and skips masked tokens; a cache and several sequences in a row are refused.

    Args:
        kind: ``"fla:<layer>"``, a layer that mixes hidden states alone (and not, say, with those of another layer).
        hidden_size: of the layer.
        layer_idx: which block this is, for the layers that ask.
        options: further arguments of the layer.

    Raises:
        RuntimeError: if flash-linear-attention cannot be imported.
        ValueError: if it has no such layer.
    """

    def __init__(self, kind: str, hidden_size: int, layer_idx: int, **options: Any) -> None:
        super().__init__()
        self.kind = kind
        try:
            layers = import_module("fla.layers")
        except ImportError as error:
            raise RuntimeError(
                f"layer type {kind!r} is a layer of flash-linear-attention, which cannot be imported ({error}):"
                " pip install 'fwpkm[fla]'"
            ) from error
        layer: Any = getattr(layers, kind.removeprefix(FLASH_LINEAR), None)
        found = isinstance(layer, type) and issubclass(layer, nn.Module)
        require(found, "layer_types", repr(kind), "a layer of fla.layers after {!r}", FLASH_LINEAR)
        if "layer_idx" in signature(layer).parameters:
            options["layer_idx"] = layer_idx
        self.layer = layer(hidden_size=hidden_size, **options)

    def forward(
        self, hidden: Tensor, cache: Any = None, mask: Tensor | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """Mix ``[B, T, D]``; ``mask [B, T]`` is false at tokens to skip.

        Raises:
            ValueError: for a cache, or for ``starts``.
        """
        require(cache is None, "past_key_values", type(cache).__name__, "None: {} keeps no state of ours", self.kind)
        require(starts is None, "starts", "given", "None: {} takes one sequence a row", self.kind)
        out = self.layer(hidden, attention_mask=None if mask is None else mask.int())
        return out[0] if isinstance(out, tuple) else out


AttentionInterface.register(WINDOWED, windowed_attention_forward)
AttentionMaskInterface.register(WINDOWED, windowed_mask)
