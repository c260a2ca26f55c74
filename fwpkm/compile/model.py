"""A model in one graph, and its inference step in two."""

from typing import Any

import torch
from torch import Tensor, nn

from fwpkm.checks import require, require_choice
from fwpkm.compile.inference import PIECE, TOKEN, InferenceStep
from fwpkm.compile.step import Step, sizes_as_if_unknown
from fwpkm.models import FwPKMForCausalLM

MODES = ("default", "reduce-overhead", "max-autotune")
# Batches of one row, texts of one token, shorter than a chunk, of whole chunks and with an open one, with gradients
# and without: each combination is a graph, of which torch allows 8 for a function.
GRAPHS = 64


def compile_model(model: nn.Module, mode: str = "default", dynamic: bool | None = None) -> Any:
    """``model`` compiled by ``torch.compile`` as a single graph, for training and inference.

    It compiles once for a shape, and once more for each kind of shapes that differs in what there is to do. torch's
    limit of graphs for a function is raised to 64, for the whole process.

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
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    return torch.compile(model, fullgraph=True, dynamic=dynamic, mode=None if mode == "default" else mode)


def compile_step(
    model: FwPKMForCausalLM, batch: int = 1, capacity: int = 4096, max_length: int | None = None
) -> InferenceStep:
    """The inference step of ``model`` compiled by ``torch.compile``: a graph for one token, and one for several.

    It is what :func:`fwpkm.compile.export` writes to files, compiled at the first calls, with the weights of ``model``
    as they are at each call.

    Args:
        model: in evaluation mode, with sliding-window and full attention; its memories are committed first.
        batch: rows.
        capacity: tokens of a row for which a state has room: its size, and the time of a step, grow with it.
        max_length: tokens that are read at once; a chunk and one token are the most, and what it is by default. With a
            lookahead above 2 it is 1.

    Raises:
        ValueError: for a model in training mode or one that cannot be exported, and for numbers out of range.
    """
    require(not model.training, "model.training", model.training, "False, of model.eval()")
    step = Step(model, batch, capacity)
    longest = step.longest(max_length)
    model.commit()
    compiled = torch.compile(step, fullgraph=True)

    @torch.no_grad()
    def run_token(token: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        torch._dynamo.mark_static(token)
        found: tuple[Tensor, list[Tensor]] = compiled(token, state)
        return found

    @torch.no_grad()
    def run_piece(tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if longest > 2:
            torch._dynamo.mark_dynamic(tokens, 1, min=2, max=longest)
        with sizes_as_if_unknown():
            found: tuple[Tensor, list[Tensor]] = compiled(tokens, state)
        return found

    return InferenceStep({TOKEN: run_token, PIECE: run_piece}, step.about(longest), step.given())
