"""How an operator of the ``fwpkm`` namespace is registered: schema, implementations, fake, FLOP formula, backward,
batching rule.
"""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fwpkm.checks import require, require_dtype
from fwpkm.ops._implementation import checks_values, implementation_on, load

LIBRARY = torch.library.Library("fwpkm", "DEF")


def register(
    schema: str,
    reference: Callable[..., Any],
    triton: str,
    fake: Callable[..., Any],
    flops: Callable[..., int],
    check: Callable[..., None] | None = None,
) -> Any:
    """Register ``fwpkm::<schema>`` and return the callable operator.

    ``reference`` computes it with ATen calls, on any device, and checks the values of its arguments. ``triton`` names
    the implementation for CUDA tensors, ``"module:function"``, imported at its first call; ``check`` is called with the
    arguments before it if ``FWPKM_CHECK=1`` (see :mod:`fwpkm.ops._implementation`). ``fake`` computes the outputs'
    shapes, dtypes and (contiguous) strides without looking at any data. ``flops`` is called with the arguments by name,
    shapes in place of tensors, and counts two operations a multiply-add.
    """
    name = schema.split("(", 1)[0]

    def on(kind: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in args):
                _refuse_forward_mode(operator)
            if torch.is_autocast_enabled(kind):  # products are those of the dtypes given
                with torch.autocast(kind, enabled=False):
                    return call(*args)
            if implementation_on(kind) == "reference":
                return reference(*args)
            _check_for_triton(names, args)
            if check is not None and checks_values():
                check(*args)
            with torch.cuda.device_of(args[0]):  # kernels run on the current device
                return load(triton)(*args)

        return call

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on("cpu"), "CPU")
    LIBRARY.impl(name, on("cuda"), "CUDA")
    torch.library.register_fake(f"fwpkm::{name}", fake, lib=LIBRARY)
    packet = getattr(torch.ops.fwpkm, name)
    operator = packet.default
    names = argument_names(operator)
    register_flop_formula(packet)(lambda *args, out_shape: flops(**dict(zip(names, args, strict=True))))
    return operator


def argument_names(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


def _check_for_triton(names: list[str], args: tuple[Any, ...]) -> None:
    """Kernels compute in float32, and take pointers for what they are told."""
    device = args[0].device
    for name, x in zip(names, args, strict=True):
        if isinstance(x, Tensor):
            if x.device != device:
                require(False, f"{name}.device", x.device, "{}, where {} is", device, names[0])
            if x.is_floating_point():
                require_dtype(name, x, torch.float32, torch.bfloat16, torch.float16)


def register_backward(
    operator: Any, backward: Callable[..., Any], setup_context: Callable[..., Any], vmap: Callable[..., Any]
) -> None:
    """Give ``operator`` a gradient and a batching rule, for autograd and for the transforms of ``torch.func``.

    As in ``torch.autograd.Function``, ``setup_context(ctx, inputs, output)`` saves, ``backward(ctx, *grads)`` computes,
    and ``vmap(info, in_dims, *args)`` answers for a whole batch, with one call of the operator.
    """
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=LIBRARY)
    _register_transforms(operator, operator, setup_context, backward, vmap)


def refuse_double_backward(operator: Any, vmap: Callable[..., Any]) -> None:
    """A backward operator has no gradient of its own: asking for one is an error, never a silent zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{operator}: double backward is not implemented")

    register_backward(operator, backward, lambda ctx, inputs, output: None, vmap)


def refuse_gradients(operator: Any, vmap: Callable[..., Any]) -> None:
    """An operator that works in place is outside autograd: of the transforms of ``torch.func`` it knows only vmap."""

    def refuse(*args: Any) -> Any:
        raise RuntimeError(f"{operator} works in place, outside autograd: of torch.func it supports vmap only")

    _register_transforms(operator, refuse, refuse, refuse, vmap)


def _register_transforms(
    operator: Any,
    forward: Callable[..., Any],
    setup_context: Callable[..., Any],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
) -> None:
    """Make ``operator`` a function that ``torch.func`` can transform, while a transform is active and only then.

    What ``torch.library.register_autograd`` makes lacks the separate ``setup_context`` that transforms demand. The
    function calls the operator again once the innermost transform is done with it.
    """
    methods = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": lambda ctx, *grads: _without_lists(backward(ctx, *grads)),
        "jvp": lambda ctx, *tangents: _refuse_forward_mode(operator),
        "vmap": vmap,
    }
    function: Any = type(
        operator._opname, (torch.autograd.Function,), {name: staticmethod(f) for name, f in methods.items()}
    )
    LIBRARY.impl(operator._opname, function.apply, "FuncTorchDynamicLayerFrontMode")


def _without_lists(grads: Any) -> Any:
    """Autograd wants a list where an operator's argument is one, a function that ``torch.func`` transforms None."""
    return tuple(None if isinstance(x, list) else x for x in grads) if isinstance(grads, tuple) else grads


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _refuse_forward_mode(operator: Any) -> Never:
    raise NotImplementedError(f"{operator}: forward-mode differentiation is not implemented")
