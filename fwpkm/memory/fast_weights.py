"""What memories start from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fwpkm.checks import require_dtype, require_fast_weight_dtype, require_shape


@dataclass(frozen=True)
class FastWeights:
    """A starting point of memories: sub-keys and values, dense.

    Args:
        keys: ``[H, 2, n, Dk/2]``, or ``[M, H, 2, n, Dk/2]`` for memories that start from keys of their own; float32
            (float64 for numerical checks).
        values: ``[n * n, Dv]``, dtype of ``keys``. Many memories share it, and none writes to it.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        keys = self.all_keys
        require_shape("keys", keys, ("M", "H", 2, "n", "Dk/2"))
        require_fast_weight_dtype("keys", keys)
        require_shape("values", self.values, (keys.shape[3] ** 2, "Dv"))
        require_dtype("values", self.values, keys.dtype)

    @property
    def all_keys(self) -> Tensor:
        """The keys with the memories' dimension, ``[M or 1, H, 2, n, Dk/2]``."""
        return self.keys if self.keys.dim() == 5 else self.keys.unsqueeze(0)
