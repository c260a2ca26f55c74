"""Read on a GPU: a weighted sum of rows, and its gradients."""

from torch import Tensor

from fwpkm.ops.cuda._rows import add_to_rows_, segment
from fwpkm.ops.kernels.row_products import row_products
from fwpkm.ops.kernels.weighted_sum import weighted_sum


def forward(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    out = weights.new_empty((*slots.shape[:-1], values.shape[1]))
    index, weights = _by_token(slots), _by_token(weights)
    weighted_sum(out.view(index.shape[0], values.shape[1]), values.contiguous(), index, weights)
    return out


def backward(
    grad: Tensor, values: Tensor, slots: Tensor, weights: Tensor, values_need_grad: bool
) -> tuple[Tensor, Tensor]:
    index, vectors = _by_token(slots), grad.reshape(-1, values.shape[1]).contiguous()
    grad_weights = weights.new_empty(weights.shape)
    row_products(grad_weights.view(index.shape), values.contiguous(), index, vectors)
    grad_values = values.new_zeros(values.shape if values_need_grad else 0)
    if values_need_grad:
        add_to_rows_(grad_values, segment(index, values.shape[0]), weights, vectors)
    return grad_values, grad_weights


def _by_token(x: Tensor) -> Tensor:
    """``[..., K]`` -> ``[P, K]``, contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
