"""Addresses along chunks on a GPU: a loop of launches, chunk after chunk; no mask is looked at by the host."""

from typing import Any

from torch import Tensor

from fwpkm.ops.cuda import key_commit, product_key_address
from fwpkm.ops.product_key_scan import scan, scan_backward


def forward(
    query: Tensor, keys: Tensor, mask: Tensor, cut: Tensor | None, k: int, rate: float, score: str, eps: float
) -> tuple[Tensor, ...]:
    return scan(product_key_address.forward, key_commit.forward, query, keys, mask, k, rate, score, eps)


def backward(
    grad_scores: Tensor,
    grad_sub_scores: Tensor,
    grad_keys: Tensor,
    query: Tensor,
    keys: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    grads, shared = (grad_scores, grad_sub_scores, grad_keys), keys.shape[0] == 1
    return scan_backward(product_key_address.backward, key_commit.backward, *grads, query, shared, *others)
