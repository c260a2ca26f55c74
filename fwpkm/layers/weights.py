"""The sub-keys and values of a memory as tensors of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fwpkm.checks import require


class MemoryWeights(nn.Module):
    """A module with sub-keys ``keys [H, 2, n, Dk/2]`` and values ``values [n * n, Dv]``, parameters or buffers.

    They are float32 also in a model cast to half precision: many small steps, of an optimizer or of commits, would be
    lost in rounding, and the operators read single rows of float32 values without a copy of the table.

    Args:
        n_subkeys: ``n``, sub-keys a codebook.
        key_dim: ``Dk``, even.
        value_dim: ``Dv``.
        heads: ``H``, addresses a token; the heads share the values.
        learn_keys, learn_values: whether they are parameters.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self, n_subkeys: int, key_dim: int, value_dim: int, heads: int, learn_keys: bool, learn_values: bool
    ) -> None:
        super().__init__()
        for name, size in (("n_subkeys", n_subkeys), ("value_dim", value_dim), ("heads", heads)):
            require(size >= 1, name, size, "a positive integer")
        require(key_dim >= 2 and key_dim % 2 == 0, "key_dim", key_dim, "a positive even number, one half a codebook")
        self.heads = heads
        shapes = {"keys": (heads, 2, n_subkeys, key_dim // 2), "values": (n_subkeys**2, value_dim)}
        for name, learned in (("keys", learn_keys), ("values", learn_values)):
            tensor = torch.empty(shapes[name], dtype=torch.float32)
            if learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.reset_memory()

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Draw initial sub-keys, uniform in ``+-Dk^-1/2``, and values, normal with standard deviation ``Dv^-1/2``."""
        bound = (2 * self.keys.shape[-1]) ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.values, std=self.values.shape[1] ** -0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryWeights:
        kept = [x for weights in (self.keys, self.values) for x in (weights, weights.grad)]

        def moved(x: Tensor) -> Tensor:
            after = fn(x)
            dtype = torch.promote_types(after.dtype, torch.float32)
            if after.dtype != dtype and any(x is one for one in kept):  # a cast: repeat it without loss
                return x.to(after.device, dtype)
            return after

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in (f"{prefix}keys", f"{prefix}values"):
            if name in state_dict:  # a copy of the caller's, which `assign=True` puts in the place of ours
                state_dict[name] = at_least_float32(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        heads, _, n, half = self.keys.shape
        return f"slots={n * n}, key_dim={2 * half}, value_dim={self.values.shape[1]}, heads={heads}"


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
