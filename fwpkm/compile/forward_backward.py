"""One step of any model: its forward, and the gradients of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def forward(model: Callable[..., Any], inputs: Mapping[str, Any], training: bool) -> Any:
    """The outputs for a copy of ``inputs``, in which caches may be."""
    with torch.set_grad_enabled(training):
        return model(**copy.deepcopy(dict(inputs)))


def gradients(model: nn.Module, output: Any) -> None:
    """Compute the gradients of ``output.loss``, or of the sum of all outputs, and keep none."""
    loss = getattr(output, "loss", None)
    found = [loss] if isinstance(loss, Tensor) else [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    differentiable = [x.sum() for x in found if x.requires_grad]
    parameters = [x for x in model.parameters() if x.requires_grad]
    if differentiable and parameters:
        torch.autograd.grad(torch.stack(differentiable).sum(), parameters, allow_unused=True)
