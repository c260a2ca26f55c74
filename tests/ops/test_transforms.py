"""Operators under ``torch.func``, eagerly and compiled: a transform gives what a loop, or autograd, gives. And what
``FlopCounterMode`` counts.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from fwpkm import ops
from tests.draws import Draw, seeds, strided
from tests.ops.test_operators import CASES, DV, HALF_CASES, TOPK, Case, N, P, floating, with_gradient

every_operator = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
in_any_dtype = pytest.mark.parametrize("make", (CASES | HALF_CASES).values(), ids=CASES | HALF_CASES)
# torch itself uses it when it first makes a dual tensor
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

B = 3
Named = dict[str, Tensor]


def tensors(case: Case) -> Named:
    return case.floats | {name: x for name, x in case.others.items() if isinstance(x, Tensor)}


def outputs(case: Case, inputs: Named) -> tuple[Tensor, ...]:
    """What the operator returns for these inputs, the others as they are."""
    out = case.function(**case.floats | case.others | inputs)
    return out if isinstance(out, tuple) else (out,)


def loss(case: Case, inputs: Named) -> Tensor:
    return sum(x.sin().sum() for x in floating(outputs(case, inputs)))


def gradients(case: Case, inputs: Named) -> tuple[Tensor, ...]:
    """``torch.func.grad`` of the loss, to all float inputs."""
    floats = {name: inputs.get(name, x) for name, x in case.floats.items()}
    return tuple(grad(lambda floats: loss(case, inputs | floats))(floats).values())


def pullback(case: Case, inputs: Named) -> tuple[Tensor, ...]:
    """The same in steps that torch knows for an empty batch too (of which it cannot add two losses)."""
    floats = {name: inputs.get(name, x) for name, x in case.floats.items()}
    out, pull = vjp(lambda floats: floating(outputs(case, inputs | floats)), floats)
    return tuple(pull(tuple(x.cos() for x in out))[0].values())


def jacobians(case: Case, inputs: Named) -> tuple[Named, ...]:
    return jacrev(lambda inputs: floating(outputs(case, inputs)))(inputs)


def samples(make: Callable[[Draw, int], Case], names: Sequence[str], size: int = B, tokens: int = P) -> list[Named]:
    """The inputs ``names`` of each sample."""
    return [{name: tensors(make(Draw(seed), tokens))[name] for name in names} for seed in range(10, 10 + size)]


def stack(named: list[Named], dim: int = 0) -> Named:
    return {name: torch.stack([x[name] for x in named], dim) for name in named[0]}


def assert_same(have, want):
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def subsets(case: Case) -> list[list[str]]:
    """Each float input, all of them, and with them the slots and masks."""
    return [*([name] for name in case.floats), list(case.floats), list(tensors(case))]


@in_any_dtype
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("function", [outputs, gradients])
def test_vmap_equals_a_loop(make, function, dim):
    """Of the operator, and of its gradients: those of each sample, also to inputs that the samples share."""
    case = make(Draw(0), P)
    for names in subsets(case):
        batch = samples(make, names)
        have = vmap(lambda inputs: function(case, inputs), in_dims=dim, out_dims=dim)(stack(batch, dim))
        want = [function(case, inputs) for inputs in batch]
        assert_same(have, tuple(torch.stack(x, dim) for x in zip(*want, strict=True)))


@given(data=st.data(), name=st.sampled_from(list(CASES)), seed=seeds, size=st.integers(0, 4), tokens=st.integers(0, 4))
def test_vmap_over_any_inputs(data, name, seed, size, tokens):
    """Any inputs, each batched in a dimension of its own, for any number of samples and tokens."""
    case = CASES[name](Draw(seed), tokens)
    names = data.draw(st.lists(st.sampled_from(list(tensors(case))), min_size=1, unique=True))
    dims = {name: data.draw(st.integers(0, tensors(case)[name].dim())) for name in names}
    batch = samples(CASES[name], names, size, tokens)
    empty = {name: tensors(case)[name].expand(0, *tensors(case)[name].shape) for name in names}
    stacked = {name: x.movedim(0, dims[name]) for name, x in (stack(batch) if size else empty).items()}
    for function in (outputs, pullback):
        have = vmap(lambda inputs, function=function: function(case, inputs), in_dims=(dims,))(stacked)
        want = [function(case, inputs) for inputs in batch or [{}]]
        assert_same(have, tuple(torch.stack(x)[:size] for x in zip(*want, strict=True)))


@every_operator
@pytest.mark.parametrize("tokens", [P, 0])
def test_vmap_over_no_samples(make, tokens):
    """Shapes are known all the same."""
    case = make(Draw(0), tokens)
    for names in subsets(case):
        none = {name: x.expand(0, *x.shape) for name, x in tensors(case).items() if name in names}
        for function in (outputs, pullback):
            have = vmap(lambda inputs, function=function: function(case, inputs))(none)
            assert [x.shape for x in have] == [(0, *x.shape) for x in function(case, {})]


@in_any_dtype
def test_grad_equals_autograd(make):
    case = make(Draw(0), P)
    floats = with_gradient(case)
    want = torch.autograd.grad(loss(case, dict(zip(case.floats, floats, strict=True))), floats)
    assert_same(gradients(case, {}), want)


@every_operator
def test_autograd_of_vmap_equals_a_loop(make):
    """The gradient of an input that the samples share is the sum over them."""
    case = make(Draw(0), P)
    for names in subsets(case)[:-1]:
        batch = samples(make, names)
        shared = {name: x.clone().requires_grad_() for name, x in case.floats.items() if name not in names}
        stacked = {name: x.requires_grad_() for name, x in stack(batch).items()}
        leaves = [*shared.values(), *stacked.values()]
        have = vmap(lambda inputs, shared: loss(case, inputs | shared), in_dims=(0, None))(stacked, shared).sum()
        want = sum(loss(case, {name: x[i] for name, x in stacked.items()} | shared) for i in range(B))
        assert_same(torch.autograd.grad(have, leaves), torch.autograd.grad(want, leaves))


@every_operator
def test_jacrev_equals_autograd(make):
    case = make(Draw(0), 1)

    def function(*floats):
        return floating(case(*floats))

    want = torch.autograd.functional.jacobian(function, tuple(case.floats.values()))
    have = jacobians(case, case.floats)
    for a, b in zip(have, want if isinstance(want[0], tuple) else (want,), strict=True):
        assert_same(tuple(a.values()), b)


@every_operator
def test_batched_gradients(make):
    """Autograd's own vmap over backwards, ``is_grads_batched``."""
    case = make(Draw(0), 2)
    floats = with_gradient(case)
    out = [x for x in case(*floats) if x.requires_grad]
    grads = [torch.stack([x.detach().sin() * i for i in range(B)]) for x in out]
    have = torch.autograd.grad(out, floats, grads, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(out, floats, x, retain_graph=True) for x in zip(*grads, strict=True)]
    assert_same(have, tuple(torch.stack(x) for x in zip(*want, strict=True)))


@every_operator
def test_nested_transforms(make):
    """Jacobians of samples, which are two batches in one call, and the Jacobian of a batch."""
    case = make(Draw(0), 1)
    names = list(tensors(case))
    batch = samples(make, names, tokens=1)
    floats = [{name: x[name] for name in case.floats} for x in batch]
    others = [{name: x[name] for name in names if name not in case.floats} for x in batch]

    def jacobian(floats, others):
        return jacobians(case._replace(others=case.others | others), floats)

    want = [jacobian(*x) for x in zip(floats, others, strict=True)]
    have = vmap(jacobian)(stack(floats), stack(others)) if others[0] else vmap(lambda x: jacobian(x, {}))(stack(floats))
    for output, per_sample in zip(have, zip(*want, strict=True), strict=True):
        assert_same(output, stack(per_sample))

    def whole(floats):
        return vmap(lambda x: floating(outputs(case, x)))(floats)

    want = [jacobians(case, x) for x in floats]
    for output, per_sample in zip(jacrev(whole)(stack(floats)), zip(*want, strict=True), strict=True):
        for name, jacobian_of_batch in output.items():
            for i in range(B):
                for j in range(B):
                    block = jacobian_of_batch[i].select(per_sample[i][name].dim() - case.floats[name].dim(), j)
                    assert_same(block, per_sample[i][name] if i == j else torch.zeros_like(block))


@every_operator
@pytest.mark.parametrize("batched", [False, True])
def test_compiled_gradients(make, batched):
    """In one graph: ``func.grad``, and gradients of each sample."""
    case = make(Draw(0), P)

    def function(inputs):
        return gradients(case, inputs)

    transformed = vmap(function) if batched else function
    inputs = stack(samples(make, list(case.floats))) if batched else case.floats
    assert_same(torch.compile(transformed, fullgraph=True, backend="aot_eager")(inputs), transformed(inputs))


@every_operator
def test_forward_mode_is_refused(make):
    """By the operator, by its backward, and by the operator below vmap; what has no tangent goes through."""
    case = make(Draw(0), P)
    refused = pytest.raises(NotImplementedError, match=r"fwpkm\.\w+\.default: forward-mode .* is not implemented")
    for name, x in case.floats.items():

        def function(x, name=name):
            return floating(outputs(case, {name: x}))

        with refused:
            jvp(function, (x,), (x,))
        with refused:
            jacfwd(function)(x)
        with refused:
            hessian(lambda x, name=name: loss(case, {name: x}))(x)
        with refused:
            jvp(vmap(function), (x.expand(B, *x.shape),), (x.expand(B, *x.shape),))
        with refused, forward_ad.dual_level():
            function(forward_ad.make_dual(x, x))
        leaf = x.clone().requires_grad_()
        (out, *_) = function(leaf)
        with refused, forward_ad.dual_level():
            torch.autograd.grad(out, leaf, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))
    _, tangent = jvp(lambda x: x * loss(case, {}), (torch.ones(()),), (torch.ones(()),))
    assert_same(tangent.double(), loss(case, {}))


@every_operator
def test_second_order_is_refused(make):
    case = make(Draw(0), P)
    refused = pytest.raises(RuntimeError, match="double backward is not implemented")
    with refused:
        grad(lambda floats: sum(x.square().sum() for x in gradients(case, floats)))(case.floats)
    with refused:
        jacrev(jacrev(lambda floats: loss(case, floats)))(case.floats)


def test_a_slot_of_no_row_is_refused():
    """It must not be a row of the sample before or after."""
    draw = Draw(0)
    for slot in (-1, N):
        slots = draw.integers(N, B, P, TOPK)
        slots[1, 0, 0] = slot
        values, weights, residuals = draw.normal(B, N, DV), draw.normal(B, P, TOPK), draw.normal(B, P, DV)
        with pytest.raises(ValueError, match="slots"):
            vmap(ops.memory_read)(values, slots, weights)
        with pytest.raises(ValueError, match="slots"):
            vmap(ops.memory_write_)(values, slots, weights, residuals)
        chunked = [x.unsqueeze(1).unsqueeze(1) for x in (slots, weights, weights, residuals, weights[..., 0])]
        with pytest.raises(ValueError, match="slots"):
            vmap(ops.memory_scan)(values, *chunked)


def write_arguments() -> list[Tensor]:
    draw = Draw(0)
    return [draw.normal(B, N, DV), draw.integers(N, B, P, TOPK), draw.normal(B, P, TOPK), draw.normal(B, P, DV)]


@pytest.mark.parametrize("compiled", [False, True])
def test_write_under_vmap(compiled):
    """Each sample's values change in place, with arguments of its own or shared."""
    write = vmap(ops.memory_write_)
    write_shared = vmap(ops.memory_write_, in_dims=(0, None, None, 1))
    if compiled:
        write, write_shared = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (write, write_shared))
    values, slots, coefficients, residuals = write_arguments()
    have, want = values.clone(), values.clone()
    out = write(have, slots, coefficients, residuals)
    for row in zip(want, slots, coefficients, residuals, strict=True):
        ops.memory_write_(*row)
    assert_same((have, out), (want, want))
    write_shared(have, slots[0], coefficients[0], residuals.movedim(0, 1))
    for row, residual in zip(want, residuals, strict=True):
        ops.memory_write_(row, slots[0], coefficients[0], residual)
    assert_same(have, want)


def test_write_under_transforms_is_refused():
    """Values that samples share or that are no plain stack, and whatever differentiates."""
    values, *rest = write_arguments()
    before = values.clone()
    with pytest.raises(ValueError, match="values is the same"):
        vmap(ops.memory_write_, in_dims=(None, 0, 0, 0))(values[0], *rest)
    with pytest.raises(ValueError, match="contiguous"):
        vmap(ops.memory_write_)(strided(values), *rest)
    with pytest.raises(ValueError, match="contiguous"):
        vmap(ops.memory_write_)(torch.cat((values, values), 1)[:, :N], *rest)
    with pytest.raises(ValueError, match="contiguous"):
        vmap(ops.memory_write_, in_dims=(1, 0, 0, 0))(values.movedim(0, 1).contiguous(), *rest)
    first = [x[0] for x in (values, *rest)]

    def step(coefficients, values):
        return ops.memory_write_(values, first[1], coefficients, first[3]).sum()

    for call in (
        lambda: grad(step)(first[2], first[0]),
        lambda: vmap(grad(step))(rest[1], values.clone()),
        lambda: jvp(lambda x: step(x, first[0]), (first[2],), (first[2],)),
    ):
        with pytest.raises(RuntimeError, match=r"outside autograd: of torch\.func it supports vmap only"):
            call()
    with pytest.raises(NotImplementedError, match="forward-mode"), forward_ad.dual_level():
        step(forward_ad.make_dual(first[2], first[2]), first[0])
    assert torch.equal(values, before)


# Two operations a multiply-add. 20 queries (2 memories, 5 tokens, 2 heads) of two halves, times 4 sub-keys of width 3,
# of which 3 are selected; 20 rows of width 3 a chunk, 3 chunks read and 2 written; 28 log entries. The backward takes
# two products for one, and undoes the writes. 4 rows of the delta rule: a chunk of 5 tokens, keys of width 4, values
# of width 3.
FLOPS = {
    "product_key_topk": (0, 0),
    "product_key_address": (2 * 20 * 2 * 4 * 3, 4 * 20 * 2 * 3 * 3),
    "key_commit": (2 * 20 * 2 * 3 * 3, 4 * 20 * 2 * 3 * 3),
    "product_key_scan": (2 * 60 * 2 * 3 * (4 + 3), 8 * 60 * 2 * 3 * 3),
    "gated_delta_rule": (
        2 * 4 * (25 * (2.5 * 4 + 1.5 * 3) + 3 * 5 * 4 * 3),
        2 * 4 * (25 * (5.5 * 4 + 4 * 3) + 8 * 5 * 4 * 3),
    ),
    "memory_read": (2 * 20 * 3, 4 * 20 * 3),
    "memory_scan": (2 * 20 * 3 * (3 + 2), 2 * 20 * 3 * (2 * 3 + 3 * 2)),
    "memory_scan-log": (2 * 20 * 3 * (3 + 2) + 2 * 28 * 3, 2 * 20 * 3 * (2 * 3 + 3 * 2) + 4 * 28 * 3),
    "memory_scan-packed": (2 * 20 * 3 * (3 + 2) + 2 * 28 * 3, 2 * 20 * 3 * (2 * 3 + 3 * 2) + 4 * 28 * 3),
}


def flops(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@every_operator
def test_flops(make, request):
    name = request.node.callspec.id
    forward, backward = FLOPS.get(name) or FLOPS[name.split("-")[0]]
    case = make(Draw(0), P)
    floats = with_gradient(case)
    total = []
    assert flops(lambda: total.append(sum(x.sum() for x in floating(case(*floats))))) == forward
    assert flops(total[0].backward) == backward
    batch = stack(samples(make, list(case.floats)))
    assert flops(lambda: vmap(lambda inputs: outputs(case, inputs))(batch)) == B * forward


def test_flops_are_those_of_plain_products():
    """What torch counts of the same products written as such; an address' backward is of selected sub-keys only."""
    draw = Draw(0)
    query, keys = draw.normal(2, 7, 3, 8).requires_grad_(), draw.normal(2, 3, 2, 5, 4).requires_grad_()
    values, weights = draw.normal(6, 5).requires_grad_(), draw.normal(9, 2).requires_grad_()
    slots = draw.integers(6, 9, 2)
    halves = query.unflatten(-1, (2, 4))
    have = flops(lambda: ops.product_key_address(query, keys, 2))
    assert have == flops(lambda: torch.einsum("mphcd,mhcnd->mphcn", halves, keys)) > 0
    have = flops(lambda: ops.memory_read(values, slots, weights).sum().backward())
    assert have == flops(lambda: torch.einsum("pk,pkd->pd", weights, values[slots]).sum().backward()) > 0


def test_flops_of_a_read_without_gradient_of_the_values():
    case = CASES["memory_read"](Draw(0), P)
    weights = case.floats["weights"].requires_grad_()
    out = ops.memory_read(case.floats["values"], case.others["slots"], weights)
    assert flops(out.sum().backward) == FLOPS["memory_read"][0]


def test_flops_of_a_write():
    values, *rest = (x[0] for x in write_arguments())
    assert flops(lambda: ops.memory_write_(values, *rest)) == 2 * P * TOPK * DV
