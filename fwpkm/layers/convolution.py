"""A short causal convolution that continues across calls."""

import torch
from einops import rearrange
from torch import Tensor, nn


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

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x [B, T, D]``, the ``width - 1`` inputs before it (None at the start) -> output, the last inputs now."""
        if past is None:
            past = x.new_zeros(x.shape[0], self.width - 1, x.shape[2])
        padded = torch.cat((past, x), dim=1)
        # As an image of one row in channels-last layout, which a depthwise convolution reads without a transposition.
        image = rearrange(padded, "b t d -> b d 1 t")
        kernel = rearrange(self.weight, "d w -> d 1 1 w")
        y = nn.functional.conv2d(image, kernel.to(x.dtype), groups=x.shape[2])
        return x + rearrange(y, "b d 1 t -> b t d"), padded[:, x.shape[1] :]
