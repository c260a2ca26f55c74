"""A short causal convolution that continues across calls."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad


class CausalConvolution(nn.Module):
    """``x + conv(x)`` with a causal depthwise convolution: output ``t`` depends on inputs ``t - width + 1 .. t``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights that give ``conv(x)`` twice the scale of ``x``.

        Random and large, not zero: addresses then tell n-grams apart from the first step, and the model finds out much
        sooner that something worth reading lies there.
        """
        nn.init.normal_(self.weight, std=2 * self.width**-0.5)

    def forward(
        self, x: Tensor, past: Tensor | None = None, mask: Tensor | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """``x + conv(x) [B, T, D]``; the arguments are those of :func:`causal_convolution`."""
        return x + causal_convolution(x, self.weight.to(x.dtype), past, mask, starts)[0]


class ContinuedConv1d(nn.Conv1d):
    """transformers' depthwise convolution, by its weights, which goes on where the last call stopped."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False, padding=width - 1)

    def forward(  # type: ignore[override]
        self, x: Tensor, past: Tensor | None = None, mask: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``conv(x) [B, T, D]`` and the next ``past``; the arguments are those of :func:`causal_convolution`."""
        return causal_convolution(x, self.weight.squeeze(1).to(x.dtype), past, mask, starts)


def causal_convolution(
    x: Tensor, weight: Tensor, past: Tensor | None = None, mask: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with weights of its own: output ``t`` is ``sum_d weight[:, -1 - d] * x[t - d]``.

    Args:
        x: ``[B, T, D]``.
        weight: ``[D, width]``.
        past: the ``width - 1`` inputs before ``x``, ``[B, width - 1, D]``, or None at the start of the sequences.
        mask: ``[B, T]`` bool; a sequence is its unmasked tokens, as if the others were not there.
        starts: ``[B, T]`` bool, true at (unmasked) tokens that begin a sequence, which sees nothing before them.

    Returns:
        ``[B, T, D]``, zero where masked, and ``past`` for the next call.
    """
    length, reach = x.shape[1], weight.shape[1] - 1
    x = torch.cat((x.new_zeros(x.shape[0], reach, x.shape[2]) if past is None else past, x), dim=1)
    sequence = None if starts is None else pad(starts.cumsum(1), (reach, 0))
    if mask is not None:  # to the front with masked inputs, where no output reaches them
        order = pad(mask, (reach, 0), value=True).int().argsort(dim=1, stable=True)
        x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        sequence = None if sequence is None else sequence.gather(1, order)
    # Not in graphs: after a convolution Inductor changes the layout of all that follows, whose strides it cannot order
    # where sizes vary; sums of products it fuses with what stands around them.
    if sequence is None and not torch.compiler.is_compiling():
        # As an image of one row in channels-last layout, which a depthwise convolution reads without a transposition.
        image, kernel = rearrange(x, "b t d -> b d 1 t"), weight[:, None, None]
        y = rearrange(nn.functional.conv2d(image, kernel, groups=x.shape[2]), "b d 1 t -> b t d")
        past = x[:, length:]
    else:
        y = torch.zeros_like(x[:, reach:])
        for i in range(reach + 1):
            seen = x[:, i : i + length]
            if sequence is not None:
                seen = seen * (sequence[:, i : i + length] == sequence[:, reach:]).unsqueeze(-1)
            y = y + weight[:, i] * seen
        past = x[:, length:]
        if sequence is not None:
            past = past * (sequence[:, length:] == sequence[:, -1:]).unsqueeze(-1)
    if mask is not None:  # and back to their places
        place = (length - mask.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
        y = torch.where(mask.unsqueeze(-1), y.gather(1, place.unsqueeze(-1).expand_as(y)), 0)
    return y, past
