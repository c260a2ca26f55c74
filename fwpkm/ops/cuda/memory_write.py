"""Write on a GPU: sort by slot, add up segments."""

import torch
from torch import Tensor

from fwpkm.ops.cuda._rows import add_to_rows_, segment


def forward(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> None:
    add_to_rows_(values, segment(slots, values.shape[0]), coefficients, residuals.contiguous())
    torch.autograd.graph.increment_version(values)  # a kernel's writes are not seen by autograd
