"""Which operators a model calls that are not torch's, and what they lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._library.simple_registry import singleton as registered
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fwpkm.compile.forward_backward import forward, gradients

# fmt: off
_OF_TORCH = frozenset({
    "aten", "prim", "prims", "higher_order", "inductor", "profiler", "quantized", "mkldnn", "mkl", "onednn", "c10d",
    "_c10d_functional", "debugprims", "rngprims",
})
# fmt: on
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


@dataclass(frozen=True)
class Operator:
    """An operator that is not torch's.

    Attributes:
        name: with its namespace.
        calls: how often it was called for all inputs, without compiling.
        fake: whether it can be traced.
        backward: whether it has a gradient; None if it needs none: it works in place, gives no floating-point numbers,
            or is a gradient itself.
    """

    name: str
    calls: int
    fake: bool
    backward: bool | None

    @property
    def complete(self) -> bool:
        return self.fake and self.backward is not False


def operators_of(model: nn.Module, inputs: Sequence[Mapping[str, Any]], training: bool) -> tuple[Operator, ...]:
    """What ``model`` calls for ``inputs``, its gradients included if there are any to be had."""
    reading, learning = _Calls(), _Calls()
    for keywords in inputs:
        with reading:
            output = forward(model, keywords, training)
        if training and all(operator.complete for operator in reading.operators().values()):
            with learning:
                gradients(model, output)  # before the next forward, which may write what this one read
    found = learning.operators(needs_backward=False) | reading.operators()
    return tuple(found[name] for name in sorted(found))


def is_custom(operator: OpOverload) -> bool:
    return operator.namespace not in _OF_TORCH


def operator_name(operator: Any) -> str:
    """``namespace::name``, with the overload if it is not the default one."""
    name: str = operator.name()
    return name


class _Calls(TorchDispatchMode):
    """Counts the calls of operators that are not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self._count: Counter[OpOverload] = Counter()
        self._floating: set[OpOverload] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(func, OpOverload) and is_custom(func):
            self._count[func] += 1
            if any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(result)):
                self._floating.add(func)
        return result

    def operators(self, needs_backward: bool = True) -> dict[str, Operator]:
        """What was called so far, by name."""
        found = {}
        for operator, calls in self._count.items():
            name = operator_name(operator)
            needs = needs_backward and operator in self._floating and not operator._schema.is_mutable
            found[name] = Operator(name, calls, _has_fake(name), _has_backward(name) if needs else None)
        return found


def _has_fake(name: str) -> bool:
    composite = _any_kernel(name, "Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    return composite or registered.find(name).fake_impl.kernel is not None


def _has_backward(name: str) -> bool:
    defined = OPDEFS.get(name)
    if defined is not None:  # has a kernel for autograd in any case, which may only refuse
        return defined._backward_fn is not None
    return _any_kernel(name, "Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")


def _any_kernel(name: str, *keys: str) -> bool:
    return any(_has_kernel(name, key) for key in keys)
