"""Section 2 of docs/design.md, line by line, where it needs no operator: weights, coefficients, counts, losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fwpkm.memory.config import MemoryConfig
from fwpkm.ops.key_commit import ENTROPY_EPS, mean_usage


def keys_commit(config: MemoryConfig, training: bool) -> bool:
    """Whether chunks commit their keys in this call (``key_update``)."""
    return config.key_update == "fast" or (config.key_update == "train_only" and training)


def read_weights(scores: Tensor, config: MemoryConfig) -> Tensor:
    """Scores ``[M, P, H, k]`` -> weights ``[M, P, H * k]`` (2.3)."""
    scaled = scores.flatten(-2) / config.temperature
    if config.nonlinearity == "softmax":
        return scaled.softmax(-1)
    return scaled.relu() if config.nonlinearity == "relu" else torch.nn.functional.silu(scaled)


def write_coefficients(weights: Tensor, config: MemoryConfig) -> Tensor:
    """Learning rate, write scale and weight (2.6): what a token's residual is multiplied with, but for ``1 / N_s``."""
    length, lookahead = config.chunk_size, config.lookahead
    if length <= lookahead:
        return torch.zeros_like(weights)
    if config.write_scale == "reference":
        return weights * (config.learning_rate * weights.shape[-1] * length / (length - lookahead))
    if config.write_scale == "paper":
        return weights * config.learning_rate
    norm = weights.square().sum(-1, keepdim=True)
    empty = norm == 0
    return torch.where(empty, 0.0, weights * config.learning_rate / torch.where(empty, 1.0, norm))


def relative_write_scale(config: MemoryConfig, length: Tensor) -> Tensor:
    """Write scale of chunks of ``length [M]`` tokens over that of a full one; 0 where too short for targets (2.8)."""
    full, lookahead = config.chunk_size, config.lookahead
    scale = torch.ones(length.shape, dtype=torch.float64, device=length.device)
    if config.write_scale == "reference" and full > lookahead:
        scale = length.double() / (length - lookahead).clamp_min(1) * ((full - lookahead) / full)
    return torch.where(length <= lookahead, 0.0, torch.where(length == full, 1.0, scale))


def weights_of(coefficients: Tensor, config: MemoryConfig) -> Tensor:
    """The weights that :func:`write_coefficients` made these of; 0 where nothing is ever written."""
    length, lookahead, rate = config.chunk_size, config.lookahead, config.learning_rate
    if length <= lookahead or rate == 0:
        return torch.zeros_like(coefficients)
    if config.write_scale == "reference":
        return coefficients / (rate * coefficients.shape[-1] * length / (length - lookahead))
    if config.write_scale == "paper":
        return coefficients / rate
    norm = coefficients.square().sum(-1, keepdim=True)
    return torch.where(norm == 0, 0.0, coefficients * rate / torch.where(norm == 0, 1.0, norm))


def reads_of_slot(slots: Tensor, chunks: Tensor, n_slots: int) -> Tensor:
    """``N_s``: for each entry of ``slots [..., K]``, how many entries of the same chunk have the same slot (2.6).

    ``chunks [...]`` numbers the chunk (of a memory) that a token belongs to. Static shapes, no host sync.
    """
    entries = (slots + chunks.unsqueeze(-1) * n_slots).flatten()
    ordered = entries.sort().values
    return torch.searchsorted(ordered, entries, right=True).sub_(torch.searchsorted(ordered, entries)).view(slots.shape)


def subkey_usage(sub_scores: Tensor, sub_slots: Tensor, mask: Tensor | None, n: int) -> Tensor:
    """How often each sub-key is used by the (masked) tokens ``[G, P, H, 2, k]``: ``[G, 2, n]``, a sum over them."""
    probabilities = sub_scores.softmax(-1)
    if mask is not None:
        probabilities = torch.where(mask[..., None, None, None], probabilities, 0.0)
    return mean_usage(probabilities, sub_slots, probabilities.new_ones(()), n)


def addressing_loss(usage: Tensor, pairs: Tensor | float) -> Tensor:
    """``L_addr`` (2.7) of chunks with a :func:`subkey_usage` of ``[..., 2, n]`` by ``pairs`` (token, head) pairs."""
    mean = usage / pairs
    return (mean * (mean + ENTROPY_EPS).log()).sum((-1, -2))


def residual_dtype(config: MemoryConfig, training: bool) -> torch.dtype | None:
    """What residuals are rounded to when they arise; None for nothing. Training does not round."""
    return torch.bfloat16 if config.log_dtype == "bfloat16" and not training else None
