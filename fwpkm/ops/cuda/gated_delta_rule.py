"""Gated delta rule on a GPU: the kernels of flash-linear-attention, of which there is no second set here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _rule(name: str) -> Callable[..., Any]:
    try:
        from fla.ops import gated_delta_rule as rules
    except ImportError as error:
        raise RuntimeError(
            "gated_delta_rule on a GPU runs the kernels of flash-linear-attention, which cannot be imported"
            f" ({error}): pip install 'fwpkm[fla]', or set FWPKM_IMPL=reference, which is slow on a GPU"
        ) from error
    rule: Callable[..., Any] = getattr(rules, name)
    return rule


def forward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not query.shape[1]:
        state = value.new_zeros(query.shape[0], value.shape[2], query.shape[3], value.shape[3], dtype=torch.float32)
        return torch.empty_like(value), state if initial_state is None else state.copy_(initial_state)
    name = "fused_recurrent_gated_delta_rule" if query.shape[1] == 1 else "chunk_gated_delta_rule"
    out, state = _call(_rule(name), query, key, value, decay, beta, initial_state)
    return out.to(value.dtype).contiguous(), state.float().contiguous()


def backward(
    grad: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, decay, beta)
    if not query.shape[1]:
        of_state = grad_state.new_empty(0) if initial_state is None else grad_state.clone()
        return *(torch.zeros_like(x) for x in inputs), of_state
    # The rule and its gradients are one autograd.Function, which is called and differentiated below the dispatcher's
    # own autograd: no ATen call between may need a gradient.
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        start = None if initial_state is None else initial_state.detach().requires_grad_()
        out, state = _call(_rule("chunk_gated_delta_rule"), *leaves, start)
    wanted = leaves if start is None else [*leaves, start]
    grads = torch.autograd.grad((out, state), wanted, (grad.to(out.dtype).contiguous(), grad_state.to(state.dtype)))
    by_input = [x.to(like.dtype).contiguous() for x, like in zip(grads, wanted, strict=True)]
    return *by_input, *([grad_state.new_empty(0)] if start is None else [])


def _call(rule: Callable[..., Any], *inputs: Any) -> Any:
    """The rule as it is defined here: normalized queries and keys, a state that goes on."""
    query, key, value, decay, beta, start = inputs
    return rule(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        initial_state=start,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
