"""A model in one graph."""

from typing import Any

import torch
from torch import nn

from fwpkm.checks import require, require_choice

MODES = ("default", "reduce-overhead", "max-autotune")


def compile_model(model: nn.Module, mode: str = "default", dynamic: bool | None = None) -> Any:
    """``model`` compiled by ``torch.compile`` as a single graph, for training and inference.

    It compiles once for a shape, once more for lengths and batches that vary, and not again.

    Args:
        model: a :class:`fwpkm.models.FwPKMForCausalLM`, or a module around the layers.
        mode: of ``torch.compile``: ``"default"``; ``"reduce-overhead"`` and ``"max-autotune"``, with CUDA graphs, need
            a GPU.
        dynamic: whether sizes vary: True from the first call, None from the second shape on, False never.

    Returns:
        The compiled module, with the parameters and methods of ``model``.

    Raises:
        ValueError: for another ``mode``, or one that needs a GPU where the model is on none.
    """
    require_choice("mode", mode, MODES)
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    require(mode == "default" or device.type == "cuda", "mode", mode, "'default' for a model on {}", device)
    return torch.compile(model, fullgraph=True, dynamic=dynamic, mode=None if mode == "default" else mode)
