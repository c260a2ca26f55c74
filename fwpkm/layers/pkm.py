"""The slow product-key memory layer: a large table that is learned, in the place of an MLP."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from fwpkm.checks import require, require_shape
from fwpkm.layers.weights import MemoryWeights
from fwpkm.ops import memory_read, product_key_address
from fwpkm.ops.autocast import without_autocast


class ProductKeyMemory(MemoryWeights):
    """A layer that reads ``topk`` slots a head out of ``n_subkeys ** 2``, which gradients write.

    ``out = (v * silu(x W1)) W2``, where ``v`` is the sum over heads of the values of the best slots, weighted by a
    softmax over the dot products of each head (Lample et al. 2019, "Large Memory Layers with Product Keys"; gate and
    output projection as in "Memory Layers at Scale", Berges et al. 2024). It stands in the place of a block's MLP: the
    block norms its input and adds its output.

    ``keys`` and ``values`` are float32 parameters, also in a model cast to half precision, and addresses and reads are
    computed in float32, also under autocast (:class:`MemoryWeights`). A step touches few rows of ``values``, so these
    learn best at a rate of their own, without weight decay: :func:`fwpkm.training.optimizer.parameter_groups`.

    Args:
        hidden_size: ``D``.
        n_subkeys: ``n``, sub-keys a codebook.
        key_dim: ``Dk``, even.
        value_dim: ``Dv``.
        heads: ``H``, addresses a token; the heads share the values.
        topk: ``k``, slots a head.
    """

    def __init__(
        self,
        hidden_size: int,
        n_subkeys: int = 512,
        key_dim: int = 512,
        value_dim: int = 512,
        heads: int = 4,
        topk: int = 32,
    ) -> None:
        super().__init__(n_subkeys, key_dim, value_dim, heads, learn_keys=True, learn_values=True)
        require(hidden_size >= 1, "hidden_size", hidden_size, "a positive integer")
        require(1 <= topk <= n_subkeys, "topk", topk, "1 <= topk <= n_subkeys ({})", n_subkeys)
        self.hidden_size, self.topk = hidden_size, topk
        self.query = nn.Linear(hidden_size, heads * key_dim, bias=False)
        self.gate = nn.Linear(hidden_size, value_dim, bias=False)
        self.output = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden [B, T, D]`` -> ``[B, T, D]``."""
        require_shape("hidden", hidden, ("B", "T", self.hidden_size))
        query = rearrange(self.query(hidden), "b t (h d) -> 1 (b t) h d", h=self.heads)
        with without_autocast(hidden):
            scores, slots, _, _ = product_key_address(query, self.keys.unsqueeze(0), self.topk, score="dot")
            read = memory_read(self.values, slots.flatten(-2), scores.softmax(-1).flatten(-2))
        read = read.view(*hidden.shape[:2], self.values.shape[1]).to(hidden.dtype)
        return self.output(read * silu(self.gate(hidden)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, topk={self.topk}"
