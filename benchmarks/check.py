"""What has to hold before anything is timed: outputs equal the float64 reference, gradients those of float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import plain, released, subjects
from benchmarks.cases import Case, Inputs, draw
from benchmarks.subjects import Memory
from fwpkm import reference
from fwpkm.layers import FwPKM

TOLERANCE = 1e-4  # float32, of the largest magnitude
EXACT = 1e-9  # float64, likewise
SMALL = Case(tokens=50, n_subkeys=12, batch=2, topk=3, key_dim=8, value_dim=6, heads=2, chunk=16)

Errors = dict[str, dict[str, float]]


class WrongResultError(Exception):
    """An implementation is wrong, and so is whatever would be measured of it."""


def reference_memory(inputs: Inputs, case: Case) -> Tensor:
    start = inputs.keys, inputs.values
    return reference.fast_weight_memory(inputs.query, inputs.target, inputs.gate, *start, case.config).output


def check_plain() -> None:
    """The plain composition in float64 has the reference's outputs and gradients, at a size where that is quick."""
    inputs = draw(SMALL).to(torch.float64).requiring_gradients()
    outputs = [memory(inputs, SMALL) for memory in (reference_memory, plain.fast_weight_memory)]
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
    found = [subjects.gradients(output, inputs.leaves(), cotangent) for output in outputs]
    compare("plain in float64", ("output",), outputs[1:], outputs[:1], EXACT)
    compare("plain in float64", _GRADIENTS, found[1], found[0], EXACT)


def check_memories(case: Case, inputs: Inputs, memories: Mapping[str, Memory]) -> Errors:
    """Compare outputs with the reference, and gradients with those of the plain composition in float64.

    Args:
        case: a size.
        inputs: without near ties.
        memories: implementations by name.

    Returns:
        The largest differences of each, as shares of the largest magnitude.

    Raises:
        WrongResultError: if one is too large.
    """
    exact = inputs.to(torch.float64)
    with torch.no_grad():
        expected = reference_memory(exact, case)
    exact = exact.requiring_gradients()
    output = plain.fast_weight_memory(exact, case)
    compare("plain in float64", ("output",), [output], [expected], EXACT)
    gradients = subjects.gradients(output, exact.leaves(), exact.target.detach())
    del output, exact
    errors = {}
    for name, memory in memories.items():
        differentiable = inputs.requiring_gradients()
        output = memory(differentiable, case)
        found = subjects.gradients(output, differentiable.leaves(), inputs.target)
        errors[name] = compare(name, ("output", *_GRADIENTS), (output, *found), (expected, *gradients), TOLERANCE)
    return errors


def check_released(case: Case, inputs: Inputs) -> dict[str, float]:
    """The released code's outputs are the reference's; its gradients are compared, and the differences returned only.

    Its gradient of the queries is another one, in float64 too (docs/benchmarks.md).

    Raises:
        WrongResultError: if outputs differ.
    """
    with torch.no_grad():
        expected = reference_memory(inputs.to(torch.float64), case)
    exact = inputs.to(torch.float64).requiring_gradients()
    output = plain.fast_weight_memory(exact, case)
    gradients = subjects.gradients(output, exact.leaves(), exact.target.detach())
    del output, exact
    differentiable = inputs.requiring_gradients()
    output = released.fast_weight_memory(differentiable, case)
    errors = compare("released", ("output",), [output], [expected], TOLERANCE)
    found = subjects.gradients(output, differentiable.leaves(), inputs.target)
    return errors | compare("released", _GRADIENTS, found, gradients, float("inf"))


def check_layer(case: Case, module: FwPKM, hidden: Tensor) -> dict[str, float]:
    """The same for the layer and the gradient of its input, around the plain composition in float64.

    Raises:
        WrongResultError: if a difference is too large.
    """
    exact = hidden.double().requires_grad_()
    output = subjects.layer_formula(module, exact, case, plain.fast_weight_memory)
    (gradient,) = torch.autograd.grad(output, exact, hidden.double())
    expected = output.detach()
    x = hidden.detach().requires_grad_()
    ours = module(x)[0]
    (found,) = torch.autograd.grad(ours, x, hidden)
    return compare("layer", ("output", "gradient of hidden"), (ours, found), (expected, gradient), TOLERANCE)


_GRADIENTS = ("gradient of query", "gradient of target", "gradient of gate")


def compare(
    name: str, what: Sequence[str], found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> dict[str, float]:
    errors = {}
    for label, x, y in zip(what, found, expected, strict=True):
        if x.shape != y.shape:
            raise WrongResultError(f"{name}: {label} has shape {list(x.shape)}; expected {list(y.shape)}")
        error = float((x.detach().double() - y.detach()).abs().max() / y.detach().abs().max().clamp_min(1e-30))
        if not error <= tolerance:  # NaN is not
            raise WrongResultError(
                f"{name}: {label} is off by {error:.2g} of its largest; expected {tolerance:g} at most"
            )
        errors[label] = error
    return errors
