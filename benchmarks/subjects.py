"""What is measured: our function and layer, and the peers: plain composition, released code, published package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

import fwpkm
from benchmarks import package, plain, reads, released
from benchmarks.cases import Case, Inputs, draw
from fwpkm.layers import FwPKM

Memory = Callable[[Inputs, Case], Tensor]  # outputs [B, T, Dv]
Make = Callable[[Inputs, Case], Memory]  # one that starts from the inputs' keys and values
Run = Callable[[bool], object]  # one forward, or one forward and backward

HIDDEN = 768


def ours(inputs: Inputs, case: Case) -> Tensor:
    memory = inputs.query, inputs.target, inputs.gate, inputs.weights
    return fwpkm.fast_weight_memory(*memory, case.config).output


MEMORIES: dict[str, Make] = {
    "fwpkm": lambda inputs, case: ours,
    "plain": lambda inputs, case: plain.fast_weight_memory,
    "released": released.Released,
    "package": package.Package,
}


def installed() -> list[str]:
    """The memories that are there."""
    missing = {"released": released.folder() is None, "package": package.release() is None}
    return [name for name in MEMORIES if not missing.get(name)]


def gradients(output: Tensor, leaves: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor]:
    """Zeros where a single chunk uses nothing of a leaf."""
    return torch.autograd.grad(output, leaves, cotangent, allow_unused=True, materialize_grads=True)


def memory_run(memory: Memory, inputs: Inputs, case: Case) -> Run:
    """Without gradients, or with those of queries, targets and gates."""

    def run(backward: bool) -> object:
        if not backward:
            with torch.no_grad():
                return memory(inputs, case)
        differentiable = inputs.requiring_gradients()
        output = memory(differentiable, case)
        return gradients(output, differentiable.leaves(), inputs.target)

    return run


def module_run(module: nn.Module, hidden: Tensor) -> Run:
    """Without gradients, or with those of the input and the parameters."""

    def run(backward: bool) -> object:
        if not backward:
            with torch.no_grad():
                return module(hidden)
        x = hidden.detach().requires_grad_()
        output = module(x)
        output = output[0] if isinstance(output, tuple) else output
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return gradients(output, [x, *parameters], hidden)

    return run


def layer(case: Case) -> FwPKM:
    """The layer of this size, with a seed."""
    torch.manual_seed(0)
    return FwPKM(HIDDEN, case.n_subkeys, case.key_dim, case.value_dim, case.heads, config=case.config)


def layer_hidden(case: Case) -> Tensor:
    return torch.randn(case.batch, case.tokens, HIDDEN, generator=torch.Generator().manual_seed(2))


def layer_query(module: FwPKM, hidden: Tensor) -> Tensor:
    """The layer's queries ``[..., H, Dk]`` in float64."""
    return _projected(module, "query", hidden.double()).unflatten(-1, (module.heads, -1))


def layer_formula(module: FwPKM, hidden: Tensor, case: Case, memory: Memory) -> Tensor:
    """The layer in float64 (section 2.10 of docs/design.md), with ``memory`` in its middle."""
    hidden = hidden.double()
    target = _projected(module, "value", hidden)
    target = (target - target.mean(-1, keepdim=True)) / (target.std(-1, keepdim=True) + 1e-6)
    gate = _projected(module, "gate", hidden).squeeze(-1).sigmoid()
    start = module.keys.double(), module.values.double()
    read = memory(Inputs(layer_query(module, hidden), target, gate, *start), case)
    weight = gate.unsqueeze(-1)
    return hidden + _projected(module, "output", weight * read + (1 - weight) * target)


def _projected(module: FwPKM, name: str, x: Tensor) -> Tensor:
    norm, projection = getattr(module, f"{name}_norm"), getattr(module, name)
    # the module's norm takes its epsilon from the dtype that it computes in
    normed = rms_norm(x, x.shape[-1:], norm.weight.double(), torch.finfo(torch.float32).eps)
    return linear(normed, projection.weight.double(), projection.bias.double())


def subject(name: str, case: Case) -> Run:
    """A run by name, on inputs drawn with their near ties."""
    if name in reads.READS:
        return reads.run(reads.READS[name], reads.draw(case))
    if name == "layer":
        return module_run(layer(case), layer_hidden(case))
    inputs = draw(case)
    return memory_run(MEMORIES[name](inputs, case), inputs, case)
