"""How an operator of the ``fwpkm`` namespace is registered: schema, CPU implementation, fake, backward."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fwpkm", "DEF")


def register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``fwpkm::<schema>`` and return the callable operator.

    ``fake`` computes the outputs' shapes, dtypes and (contiguous) strides without looking at any data.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"fwpkm::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fwpkm, name).default


def register_backward(operator: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give ``operator`` a gradient: ``setup_context(ctx, inputs, output)`` saves, ``backward(ctx, *grads)``
    computes.
    """
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=LIBRARY)


def refuse_double_backward(operator: Any) -> None:
    """A backward operator has no gradient of its own: asking for one is an error, never a silent zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{operator}: double backward is not implemented")

    register_backward(operator, backward, lambda ctx, inputs, output: None)
