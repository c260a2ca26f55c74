"""What calling an operator costs beyond what it computes: checks of arguments, and torch's dispatcher."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks import timing
from benchmarks.check import WrongResultError
from fwpkm import ops
from fwpkm.ops._library import refuse_gradients, register, register_backward

Call = Callable[[bool], object]  # of a public operator, with inputs that require gradients or not


def calls() -> dict[str, Call]:
    """Each public operator on as little as it takes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> tuple[Tensor, Tensor]:
        """The same without and with a gradient."""
        x = torch.randn(shape, generator=generator)
        return x, x.clone().requires_grad_()

    def slots(*shape: int) -> Tensor:
        return torch.randint(64, shape, generator=generator)

    sub_scores, query, keys, values = normal(4, 1, 2, 8), normal(1, 4, 1, 8), normal(1, 1, 2, 8, 4), normal(64, 8)
    weights, targets, gates = normal(1, 1, 4, 2), normal(1, 1, 4, 8), normal(1, 1, 4)
    query_of_scan, mask = (
        tuple(x.detach().unsqueeze(1).requires_grad_(x.requires_grad) for x in query),
        torch.ones(1, 4),
    )
    _, _, scores, sub_slots = ops.product_key_address(query[0], keys[0], 2)
    selected = scores, scores.clone().requires_grad_()
    read, rule, decay = slots(1, 1, 4, 2), normal(1, 4, 1, 8), (-torch.rand(1, 4, 1), torch.zeros(1, 4, 1))
    decay = decay[0], decay[0].clone().requires_grad_()
    small = torch.full((4, 2), 1e-4)  # many calls write to the same values
    pages = ops.PagedLog(slots(1, 4, 2), torch.ones(1, 4, 2), torch.ones(1, 4, 8))
    table, requests, lengths = (
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.full((4,), 4),
    )
    return {
        "product_key_topk": lambda g: ops.product_key_topk(sub_scores[g], 2),
        "product_key_address": lambda g: ops.product_key_address(query[g], keys[g], 2),
        "key_commit": lambda g: ops.key_commit(query[g], keys[g], selected[g], sub_slots, None, 1.0),
        "product_key_scan": lambda g: ops.product_key_scan(query_of_scan[g], keys[g], 2, mask.bool().unsqueeze(1), 1.0),
        "memory_read": lambda g: ops.memory_read(values[0], read, weights[g]),
        "memory_write_": lambda g: ops.memory_write_(values[0], read[0, 0], small, targets[0][0, 0]),
        "memory_scan": lambda g: ops.memory_scan(values[0], read, weights[g], weights[g], targets[g], gates[g]),
        "log_read": lambda g: ops.log_read(
            values[0], read[0, 0], weights[0][0, 0], pages, table, requests, lengths, chunk_size=4
        ),
        "gated_delta_rule": lambda g: ops.gated_delta_rule(rule[g], rule[g], rule[g], decay[g], decay[g]),
    }


WITHOUT_GRADIENTS = ("memory_write_", "log_read")


class _Arguments(TorchDispatchMode):
    """Keeps what operators of ours are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "fwpkm":
            self.found.append(args)
        return operator(*args, **(kwargs or {}))


def _arguments(call: Call) -> tuple[Any, ...]:
    """What the operator is called with, in tensors of its own."""
    with torch.no_grad(), _Arguments() as mode:
        call(False)
    (args,) = mode.found
    return _cloned(args)


def _cloned(tree: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _module(name: str) -> Any:
    return import_module(f"fwpkm.ops.{name.removesuffix('_')}")


def implementation(name: str) -> Callable[..., Any]:
    """What computes an operator on the CPU."""
    found: Callable[..., Any] = _module(name)._cpu
    return found


def direct(name: str, call: Call) -> timing.Run:
    """The operator's CPU implementation with the arguments of ``call``, compared with it.

    Raises:
        WrongResultError: if the results differ.
    """
    args, compute = _arguments(call), implementation(name)
    with torch.no_grad():
        expected, result = compute(*args), call(False)
    outputs = [args[0]] if expected is None else tree_flatten(expected)[0]  # one that does returns nothing
    for x, y in zip(tree_flatten(result)[0], outputs, strict=False):  # the public function may return less
        if not torch.equal(x, y):
            raise WrongResultError(f"{name}: the operator's result is not its implementation's")
    return lambda: compute(*args)


def idle(name: str, call: Call) -> tuple[Any, timing.Run]:
    """An operator registered as ``name`` is, which does nothing but copy a ready result; and that copy by itself."""
    module = _module(name)
    with torch.no_grad():
        found = module._operator(*_arguments(call))

    def copy(*_: Any) -> Any:
        return _cloned(found)

    operator = register(str(module._operator._schema).replace("fwpkm::", "idle_"), copy, "", module._fake, copy)
    if name == "memory_write_":
        refuse_gradients(operator, copy)
    else:
        register_backward(operator, copy, module._setup_context, copy)
    return operator, copy


def measure_apart(repeats: int, count: int) -> list[dict[str, Any]]:
    """:func:`measure` in a process of its own, which it leaves with operators that compute nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, repeats, count, torch.get_num_threads()).result()


def measure(repeats: int, count: int, threads: int) -> list[dict[str, Any]]:
    """Microseconds a call, medians of ``repeats`` interleaved loops of ``count`` calls.

    The overhead is that of the public function over its implementation, in the loops next to each other: without
    gradients, in inference mode (where the operator skips autograd), and with gradients recorded. "Alone" it is that
    over an implementation which only copies a ready result, so that nothing else comes into the processor's caches.
    """
    torch.set_num_threads(threads)
    rows = []
    for name, call in calls().items():
        without, compute = partial(call, False), direct(name, call)
        operator, copy = idle(name, call)
        alone = patch.object(_module(name), "_operator", operator)
        runs = {
            "copy": _loop(copy, count, torch.no_grad),
            "alone": _loop(without, count, torch.no_grad, alone),
            "copy_inference": _loop(copy, count, torch.inference_mode),
            "alone_inference": _loop(without, count, torch.inference_mode, alone),
            "direct": _loop(compute, count, torch.no_grad),
            "call": _loop(without, count, torch.no_grad),
            "direct_inference": _loop(compute, count, torch.inference_mode),
            "inference": _loop(without, count, torch.inference_mode),
        }
        if name not in WITHOUT_GRADIENTS:
            runs["recorded"] = _loop(partial(call, True), count, torch.enable_grad)
        seconds = {key: [x / count for x in found] for key, found in timing.interleaved(runs, repeats).items()}
        row: dict[str, Any] = {"name": name} | {key: 1e6 * statistics.median(x) for key, x in seconds.items()}
        row["overhead_alone"] = _median_difference(seconds["alone"], seconds["copy"])
        row["inference_overhead_alone"] = _median_difference(seconds["alone_inference"], seconds["copy_inference"])
        row["overhead"] = _median_difference(seconds["call"], seconds["direct"])
        row["inference_overhead"] = _median_difference(seconds["inference"], seconds["direct_inference"])
        if "recorded" in seconds:
            row["recorded_overhead"] = _median_difference(seconds["recorded"], seconds["direct"])
        rows.append(row)
    return rows


def _loop(
    run: timing.Run,
    count: int,
    mode: Callable[[], AbstractContextManager[Any]],
    within: AbstractContextManager[Any] | None = None,
) -> timing.Run:
    def loop() -> None:
        with mode(), within or nullcontext():
            for _ in range(count):
                run()

    return loop


def _median_difference(x: Sequence[float], y: Sequence[float]) -> float:
    return 1e6 * statistics.median(a - b for a, b in zip(x, y, strict=True))
