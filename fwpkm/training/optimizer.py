"""Which parameters an optimizer treats alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from fwpkm.checks import require
from fwpkm.layers import FwPKM, ProductKeyMemory


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, memory_learning_rate: float
) -> list[dict[str, Any]]:
    """Three groups for an optimizer: matrices, vectors without weight decay, and memories without weight decay.

    The last one is for what is learned a few rows at a time, and would decay between two visits: the values of
    product-key memories ("Memory Layers at Scale", Berges et al. 2024, trains them at a constant rate of their own),
    and the learned initial values and ``slow`` keys of fast-weight memories. Vectors are norms, biases and their like.

    Args:
        model: whose parameters; each that requires a gradient is in one group.
        learning_rate: of the first two groups.
        weight_decay: of the first.
        memory_learning_rate: of the last.

    Returns:
        The groups, in this order also when some are empty, so that a schedule can treat each in its way:
        ``LambdaLR(optimizer, [cosine, cosine, lambda step: 1.0])``.

    Raises:
        ValueError: for a negative rate or decay.
    """
    numbers = {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "memory_learning_rate": memory_learning_rate,
    }
    for name, number in numbers.items():
        require(number >= 0, name, number, "a number >= 0")
    rows = set()
    for module in model.modules():
        if isinstance(module, FwPKM):
            rows |= {module.keys, module.values}
        elif isinstance(module, ProductKeyMemory):
            rows.add(module.values)
    learned = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in learned if p not in rows]
    return [
        {"params": [p for p in rest if p.dim() > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "lr": learning_rate, "weight_decay": 0.0},
        {"params": [p for p in learned if p in rows], "lr": memory_learning_rate, "weight_decay": 0.0},
    ]
