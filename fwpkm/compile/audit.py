"""What ``torch.compile`` makes of a model: graphs, breaks, recompiles, copies, and what they cost."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from fwpkm.checks import require
from fwpkm.compile.capture import Capture, Copy, Graph, where
from fwpkm.compile.forward_backward import forward, gradients
from fwpkm.compile.measure import Cost, compare
from fwpkm.compile.operators import Operator, operators_of

_LIMIT = 64  # recompiles of a function before torch gives up on it; an audit goes on for longer


@dataclass(frozen=True)
class Break:
    """Where a graph ended before the model did."""

    reason: str
    where: str
    stack: tuple[str, ...]  # the calls that led there, outermost first


@dataclass(frozen=True)
class Recompile:
    """A function compiled once more, and the guards that did not hold for the input."""

    input: int
    function: str
    guards: str


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found. ``gradients``: whether graphs of the gradients were asked for."""

    gradients: bool
    graphs: tuple[Graph, ...]
    breaks: tuple[Break, ...]
    recompiles: tuple[Recompile, ...]
    copies: tuple[Copy, ...]
    operators: tuple[Operator, ...]
    cost: Cost | None

    @property
    def clean(self) -> bool:
        """Whether nothing breaks a graph, no large tensor is copied, and no operator lacks a fake or a backward."""
        return not self.breaks and not self.copies and all(operator.complete for operator in self.operators)

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries."""
        return {"clean": self.clean, **dataclasses.asdict(self)}

    def table(self) -> Table:
        """Everything in lines that a terminal shows."""
        table = Table("Audit", "", title="clean" if self.clean else "not clean")

        def section(name: str, rows: Sequence[str]) -> None:
            for i, row in enumerate(rows or ["none"]):
                table.add_row(name if i == 0 else "", escape(row))
            table.add_section()

        section("graphs", [_graph(i, graph) for i, graph in enumerate(self.graphs)])
        section("breaks", [f"{x.where}: {x.reason}" for x in self.breaks])
        section("recompiles", [f"input {x.input}: {x.function}: {x.guards}" for x in self.recompiles])
        section("copies", [_copy(x) for x in self.copies])
        section("operators", [_operator(x) for x in self.operators])
        if self.cost is not None:
            cost = self.cost
            section("time", [f"eager {1e3 * cost.eager_seconds:.2f} ms, compiled {1e3 * cost.compiled_seconds:.2f} ms"])
            section("memory", [f"eager {cost.eager_bytes:,} bytes, compiled {cost.compiled_bytes:,} bytes"])
        return table


def audit(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    training: bool | None = None,
    measure: bool = False,
) -> Audit:
    """Compile a copy of ``model`` without insisting on one graph, call it, and say what came of it.

    Graphs are captured as Inductor has them before it writes code; without ``measure`` none is written. What happens
    inside an operator is not seen. Forgets what ``torch.compile`` has compiled before.

    Args:
        model: a module that is not compiled. Neither its tensors nor its state change.
        inputs: keyword arguments of its ``forward``, or several of them, for calls one after the other.
        training: whether to train, gradients included; by default what ``model.training`` says.
        measure: compile with Inductor too, and compare time and peak memory of the first input with the eager model.

    Raises:
        ValueError: for a compiled model, or no inputs.
    """
    require(not isinstance(model, OptimizedModule), "model", "compiled", "the module itself")
    given = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    require(len(given) > 0, "inputs", inputs, "keyword arguments, or a sequence of them")
    training = model.training if training is None else training
    operators = operators_of(copy.deepcopy(model).train(training), given, training)
    # Torch refuses to trace gradients of an operator without a backward.
    with_gradients = training and all(operator.backward is not False for operator in operators)
    capture, breaks, recompiles = _captured(copy.deepcopy(model).train(training), given, with_gradients)
    return Audit(
        gradients=with_gradients,
        graphs=tuple(capture.graphs),
        breaks=breaks,
        recompiles=recompiles,
        copies=tuple(capture.copies),
        operators=operators,
        cost=_cost(copy.deepcopy(model).train(training), given[0], with_gradients) if measure else None,
    )


def _captured(
    model: nn.Module, inputs: Sequence[Mapping[str, Any]], with_gradients: bool
) -> tuple[Capture, tuple[Break, ...], tuple[Recompile, ...]]:
    from torch._dynamo import utils

    capture = Capture(model)
    breaks: list[Break] = []
    recompiles: list[Recompile] = []
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=_LIMIT))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))  # graphs are not to be skipped
        torch._dynamo.reset()
        stack.callback(torch._dynamo.reset)
        utils.set_compilation_metrics_limit(1 << 16)
        stack.callback(utils.set_compilation_metrics_limit, utils.DEFAULT_COMPILATION_METRICS_LIMIT)
        compiled = torch.compile(model, backend=capture)
        for capture.input, keywords in enumerate(inputs):
            utils.clear_compilation_metrics()
            output = forward(compiled, keywords, with_gradients)
            if with_gradients:
                gradients(model, output)
            for record in utils.get_compilation_metrics():
                begins = _place(record.co_filename, record.co_firstlineno)
                function = f"{record.co_name} ({begins})"
                if record.recompile_reason:
                    recompiles.append(Recompile(capture.input, function, _guards(record.recompile_reason)))
                if record.fail_reason:  # the frame runs without being compiled
                    place = _place(record.fail_user_frame_filename, record.fail_user_frame_lineno) or begins
                    breaks.append(Break(_summary(record.fail_reason), place, (place,)))
        for found in utils.graph_break_reasons:
            places = tuple(where([(frame.filename, frame.lineno)]) for frame in found.user_stack)
            breaks.append(Break(_summary(found.reason), places[-1], places))
    longest = {(x.where, x.reason): x for x in sorted(breaks, key=lambda x: len(x.stack))}  # of those at one place
    return capture, tuple(longest.values()), tuple(recompiles)


def _cost(model: nn.Module, inputs: Mapping[str, Any], with_gradients: bool) -> Cost:
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    compiled = torch.compile(model)

    def step(call: Any) -> None:
        output = forward(call, inputs, with_gradients)
        if with_gradients:
            gradients(model, output)

    cost = compare(lambda: step(model), lambda: step(compiled), device)
    torch._dynamo.reset()
    return cost


def _graph(number: int, graph: Graph) -> str:
    ours = "".join(f", {name} × {calls}" for name, calls in sorted(graph.operators.items()))
    return f"{number}: input {graph.input}, {graph.phase}: {graph.aten_calls} ATen calls{ours}"


def _copy(found: Copy) -> str:
    place = found.where or "somewhere"
    return f"graph {found.graph}: {place}: {found.operator} of {found.tensor}, {found.bytes:,} bytes"


def _operator(operator: Operator) -> str:
    lacks = [name for name, there in (("fake", operator.fake), ("backward", operator.backward)) if there is False]
    return f"{operator.name} × {operator.calls}" + (f": no {' and no '.join(lacks)}" if lacks else "")


def _place(file: str | None, line: int | None) -> str:
    return where([(file, line)] if file else [])


def _summary(reason: str) -> str:
    """What torch says of a break, without its hints."""
    return _one_line(reason.split("\n  Hint:")[0].split("\n\n")[0].replace("Explanation: ", ""))


def _guards(reason: str) -> str:
    return _one_line(reason.split("\nUser stack trace:")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())
