"""What has to hold before anything is timed: outputs equal the float64 reference, gradients those of float64."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import plain, reads, subjects
from benchmarks.cases import Case, Inputs, draw
from benchmarks.reads import Rows
from benchmarks.subjects import Make
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


def check_memories(
    case: Case, inputs: Inputs, memories: Mapping[str, Make], forward_only: Collection[str] = ()
) -> Errors:
    """Compare outputs with the reference, and gradients with those of the plain composition in float64.

    The released code's gradient of the queries is another one, in float64 too (docs/benchmarks.md): the differences of
    its gradients are returned only.

    Args:
        case: a size.
        inputs: without near ties.
        memories: implementations by name.
        forward_only: those whose gradients are not looked at.

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
    for name, make in memories.items():
        differentiable = inputs.requiring_gradients()
        with torch.set_grad_enabled(name not in forward_only):
            output = make(inputs, case)(differentiable, case)
        errors[name] = compare(name, ("output",), [output], [expected], TOLERANCE)
        if name not in forward_only:
            found = subjects.gradients(output, differentiable.leaves(), inputs.target)
            tolerance = math.inf if name == "released" else TOLERANCE
            errors[name] |= compare(name, _GRADIENTS, found, gradients, tolerance)
    return errors


def check_reads(rows: Rows) -> Errors:
    """Compare reads, and gradients of values and weights, with indexing in float64.

    Raises:
        WrongResultError: if a difference is too large.
    """
    exact = rows._replace(values=rows.values.double(), weights=rows.weights.double())
    expected = reads.gradients(reads.indexing, exact)
    what = "output", "gradient of values", "gradient of weights"
    return {
        name: compare(name, what, reads.gradients(read, rows), expected, TOLERANCE)
        for name, read in reads.READS.items()
    }


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
