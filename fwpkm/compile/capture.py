"""The graphs of a compiled model as Inductor has them before it writes code; here none is written."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fwpkm.compile.operators import is_custom, operator_name

LARGE = 4096  # elements; nobody notices a copy of less
# What makes a new tensor of a whole one, besides the operators that torch tags as pointwise.
# fmt: off
_COPYING = frozenset({
    "clone", "copy", "_to_copy", "convert_element_type", "index_put", "_unsafe_index_put", "index_add",
    "index_copy", "index_fill", "index_reduce", "put", "scatter", "scatter_add", "scatter_reduce", "slice_scatter",
    "select_scatter", "as_strided_scatter", "diagonal_scatter", "masked_scatter", "constant_pad_nd", "cat", "repeat",
})
# fmt: on
_FRAME = re.compile(r'File "(.+?)", line (\d+)')


@dataclass(frozen=True)
class Graph:
    """One graph that Inductor would compile.

    Attributes:
        input: which input it was captured for, from 0.
        phase: ``"inference"``, ``"forward"`` or ``"backward"``.
        operators: calls of each operator that is not torch's.
        aten_calls: calls of torch's operators, views left out.
    """

    input: int
    phase: str
    operators: dict[str, int]
    aten_calls: int


@dataclass(frozen=True)
class Copy:
    """A call that makes a new tensor of a whole large parameter or buffer.

    Attributes:
        graph: which one of the graphs, from 0.
        operator: what makes it.
        tensor: of what: the model's name for it.
        bytes: how large it is.
        where: file and line, where known.
    """

    graph: int
    operator: str
    tensor: str
    bytes: int
    where: str


class Capture:
    """A backend of ``torch.compile`` that keeps what Inductor is given."""

    def __init__(self, model: nn.Module) -> None:
        self.graphs: list[Graph] = []
        self.copies: list[Copy] = []
        self.input = 0
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(x): name for name, x in tensors if x.numel() >= LARGE}

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx  # takes seconds to import

        names = {i: self._names[id(x)] for i, x in enumerate(inputs) if id(x) in self._names}
        keep: Any = partial(self._keep, names)
        compiled: Any = compile_fx(module, inputs, inner_compile=keep)
        return compiled

    def _keep(
        self,
        names: dict[int, str],
        module: fx.GraphModule,
        inputs: Sequence[Any],
        is_inference: bool = False,
        is_backward: bool = False,
        **_: Any,
    ) -> Callable[..., Any]:
        """Keep a graph; ``names`` are those of the large inputs that the forward has, and a backward may have too."""
        from torch._inductor.fx_passes.post_grad import post_grad_passes
        from torch._inductor.virtualized import V

        last = copy.deepcopy(module)
        with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)):
            post_grad_passes(last, is_inference)  # the last of them writes in place what can be
        phase = "backward" if is_backward else "inference" if is_inference else "forward"
        targets = [node.target for node in last.graph.nodes if isinstance(node.target, OpOverload)]
        custom = Counter(operator_name(target) for target in targets if is_custom(target))
        aten = sum(not is_custom(target) and not _is_view(target) for target in targets)
        parts = _parts(last.graph, names)
        self.copies += [_described(node, name, len(self.graphs)) for node, name in _copies(last.graph, parts)]
        self.graphs.append(Graph(self.input, phase, dict(custom), aten))
        boxed: Callable[..., Any] = make_boxed_func(module.forward)
        return boxed


def where(frames: Sequence[tuple[str, int | None]]) -> str:
    """File and line of the innermost of ``frames``; the file from here on if it lies below the working directory."""
    if not frames:
        return ""
    file, line = frames[-1]
    here = Path.cwd()
    path = Path(file)
    return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{line}"


def _parts(graph: fx.Graph, names: dict[int, str]) -> dict[fx.Node, str]:
    """The nodes that share memory with a large parameter or buffer, and its name."""
    parts: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = names.get(getattr(node.meta.get("desc"), "idx", -1))
        elif _is_view(node.target) or _writes(node.target):
            name = next((parts[x] for x in node.all_input_nodes[:1] if x in parts), None)
        else:
            name = None
        if name is not None:
            parts[node] = name
    return parts


def _copies(graph: fx.Graph, parts: dict[fx.Node, str]) -> list[tuple[fx.Node, str]]:
    found = []
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or _size(node) < LARGE:
            continue
        sources = [x for x in node.all_input_nodes if x in parts and _size(x) >= LARGE]
        if node.target is torch.ops.aten.copy_.default:
            target, source = node.args[:2]
            # Inductor drops a copy to itself, and computes a pointwise result that nobody else needs in its place.
            in_place = source is target or (_is_pointwise(source) and len(source.users) == 1)
            copies = node in parts and not in_place
        elif node in parts:
            copies = False
        elif _is_pointwise(node):
            copies = any(_size(x) == _size(node) for x in sources) and not _goes_back(node, parts)
        else:
            copies = bool(sources) and node.target._opname in _COPYING and node.all_input_nodes[0] in sources
        if copies:
            found.append((node, parts[node] if node in parts else parts[sources[0]]))
    return found


def _goes_back(node: fx.Node, parts: dict[fx.Node, str]) -> bool:
    """Whether a result is only written to where one of its arguments is."""
    users = list(node.users)
    return len(users) == 1 and users[0].target is torch.ops.aten.copy_.default and users[0] in parts


def _described(node: fx.Node, name: str, graph: int) -> Copy:
    size = _size(node) * node.meta["val"].element_size()
    near = (node, *node.all_input_nodes[1:], *node.users)  # what a pass has put there comes from nowhere
    stack = next((x.meta["stack_trace"] for x in near if x.meta.get("stack_trace")), "")
    frames = [(file, int(line)) for file, line in _FRAME.findall(stack)]
    return Copy(graph, operator_name(node.target), name, size, where(frames))


def _is_view(target: Any) -> bool:
    """Whether it gives another view of its first argument, or takes one view from several."""
    if not isinstance(target, OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    returns = target._schema.returns
    views = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return views or target._opname == "_unsafe_view"


def _writes(target: Any) -> bool:
    """Whether it returns its first argument, written to."""
    returns = target._schema.returns if isinstance(target, OpOverload) else []
    return bool(returns) and returns[0].alias_info is not None and returns[0].alias_info.is_write


def _is_pointwise(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and isinstance(node.target, OpOverload)
        and torch.Tag.pointwise in node.target.tags
        and node.target._opname not in _COPYING
    )


def _size(node: fx.Node) -> int:
    """Elements of a node's tensor; where that varies, of the one it was traced with."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    elements: Any = value.numel()
    return int(elements if isinstance(elements, int) else elements.node.hint or 0)
