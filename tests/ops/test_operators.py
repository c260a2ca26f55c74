"""What every operator promises, whatever it computes: registration, gradients, layouts, determinism, one graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fwpkm import ops
from fwpkm.ops import IndexedLog, Level, Log
from tests.draws import Draw, strided

M, S, P, H, N_SUB, HALF, DV, TOPK = 2, 3, 5, 2, 4, 3, 3, 2
BEST = 3  # of a codebook: not as many as there are codebooks
N = N_SUB**2


class Case(NamedTuple):
    """A public operator with inputs of a given number of tokens: ``floats`` may require gradients."""

    function: Callable[..., Any]
    floats: dict[str, Tensor]
    others: dict[str, Any]

    def __call__(self, *floats: Tensor) -> tuple[Tensor, ...]:
        out = self.function(**dict(zip(self.floats, floats, strict=True)), **self.others)
        return out if isinstance(out, tuple) else (out,)


def topk_case(draw: Draw, tokens: int) -> Case:
    return Case(ops.product_key_topk, {"sub_scores": draw.normal(M, tokens, H, 2, N_SUB)}, {"k": BEST})


def address_case(draw: Draw, tokens: int, score: str = "idw", shared: bool = False) -> Case:
    keys = draw.normal(1 if shared else M, H, 2, N_SUB, HALF)
    floats = {"query": draw.normal(M, tokens, H, 2 * HALF), "keys": keys}
    return Case(ops.product_key_address, floats, {"k": BEST, "score": score})


def key_commit_case(draw: Draw, tokens: int, score: str = "idw", masked: bool = False, shared: bool = False) -> Case:
    query, keys = draw.normal(M, tokens, H, 2 * HALF), draw.normal(1 if shared else M, H, 2, N_SUB, HALF)
    _, _, sub_scores, sub_slots = ops.product_key_address(query, keys, BEST, score)
    mask = draw.integers(2, M, tokens).bool() if masked else None
    floats = {"query": query, "keys": keys, "sub_scores": sub_scores}
    return Case(ops.key_commit, floats, {"sub_slots": sub_slots, "mask": mask, "rate": 0.7, "score": score})


def key_scan_case(draw: Draw, tokens: int, score: str = "idw", shared: bool = False, cut: bool = False) -> Case:
    floats = {
        "query": draw.normal(M, S, tokens, H, 2 * HALF),
        "keys": draw.normal(1 if shared else M, H, 2, N_SUB, HALF),
    }
    mask = draw.integers(4, M, S, tokens) > 0
    others = {"k": BEST, "mask": mask, "rate": 0.7, "score": score}
    return Case(ops.product_key_scan, floats, others | {"cut": draw.integers(2, M, S).bool() if cut else None})


def delta_rule_case(draw: Draw, tokens: int, fresh: bool = False) -> Case:
    """Of two heads that share their keys."""
    floats = {
        "query": draw.normal(M, tokens, 1, HALF + 1),
        "key": draw.normal(M, tokens, 1, HALF + 1),
        "value": draw.normal(M, tokens, H, DV),
        "decay": -draw.uniform(M, tokens, H),
        "beta": draw.uniform(M, tokens, H),
    }
    if not fresh:
        floats["initial_state"] = draw.normal(M, H, HALF + 1, DV)
    return Case(ops.gated_delta_rule, floats, {})


def read_case(draw: Draw, tokens: int) -> Case:
    floats = {"values": draw.normal(N, DV), "weights": draw.normal(M, tokens, TOPK)}
    return Case(ops.memory_read, floats, {"slots": draw.integers(N, M, tokens, TOPK)})


def scan_case(draw: Draw, tokens: int, log: bool = False, packed: bool = False) -> Case:
    shape = (M, S, tokens, TOPK)
    floats = {
        "values": draw.normal(N, DV),
        "weights": draw.normal(*shape),
        "coefficients": draw.normal(*shape) * 0.3,
        "targets": draw.normal(*shape[:3], DV),
        "gates": draw.uniform(*shape[:3]),
    }
    slots = draw.integers(N // 2, *shape)  # half of the slots: some are hit by several tokens
    if not log:
        return Case(ops.memory_scan, floats, {"slots": slots})
    records = 7
    log_slots = draw.integers(N + 1, M, records, TOPK) - 1  # -1: no read
    chunks = torch.arange(records).expand(M, -1) // 3 + 5
    floats |= {"log_coefficients": draw.normal(M, records, TOPK), "log_residuals": draw.normal(M, records, DV)}
    others = {"slots": slots, "log_slots": log_slots, "log_chunks": chunks, "log_lengths": torch.tensor([records, 4])}
    if packed:
        others |= {"sequences": draw.integers(2, *shape[:3]), "cut": torch.full((M, S), -1)}
    return Case(scan_with_log, floats, others)


def scan_with_log(log_slots, log_coefficients, log_residuals, log_chunks, log_lengths, **inputs):
    return ops.memory_scan(
        **inputs, log=Log(log_slots, log_coefficients, log_residuals, log_chunks, log_lengths, lookahead=1)
    )


def indexed_case(draw: Draw, tokens: int) -> Case:
    case, records = scan_case(draw, tokens), 4
    levels = [
        *(draw.integers(M * N, 9).sort().values, draw.integers(records, 9), draw.normal(9)),
        *(torch.arange(1, M * N, 3), draw.normal(11, DV)),
        *(draw.integers(M * N, 5).sort().values, draw.integers(records, 5), draw.normal(5)),
        *(torch.arange(0), draw.normal(0, DV)),
    ]
    others = {f"level_{i}": x for i, x in enumerate(levels)} | {"log_residuals": draw.normal(M, records, DV)}
    return Case(scan_with_index, case.floats, case.others | others)


def scan_with_index(values, slots, weights, coefficients, targets, gates, log_residuals, **levels):
    tensors = [x.to(values.dtype) if x.is_floating_point() else x for x in levels.values()]
    log = IndexedLog(N, log_residuals.to(values.dtype), (Level(*tensors[:5]), Level(*tensors[5:])))
    return ops.memory_scan(values, slots, weights, coefficients, targets, gates, log)


CASES: dict[str, Callable[[Draw, int], Case]] = {
    "product_key_topk": topk_case,
    "product_key_address": address_case,
    "product_key_address-dot": lambda d, t: address_case(d, t, "dot"),
    "product_key_address-shared": lambda d, t: address_case(d, t, shared=True),
    "key_commit": key_commit_case,
    "key_commit-dot": lambda d, t: key_commit_case(d, t, "dot"),
    "key_commit-masked": lambda d, t: key_commit_case(d, t, masked=True),
    "key_commit-shared": lambda d, t: key_commit_case(d, t, shared=True),
    "product_key_scan": key_scan_case,
    "product_key_scan-shared": lambda d, t: key_scan_case(d, t, "dot", shared=True),
    "gated_delta_rule": delta_rule_case,
    "gated_delta_rule-fresh": lambda d, t: delta_rule_case(d, t, fresh=True),
    "memory_read": read_case,
    "memory_scan": scan_case,
    "memory_scan-log": lambda d, t: scan_case(d, t, log=True),
    "memory_scan-packed": lambda d, t: scan_case(d, t, log=True, packed=True),
}


def halved(name: str, argument: str, dtype: torch.dtype) -> Callable[[Draw, int], Case]:
    """The case ``name`` with one of its arguments in half precision."""

    def make(draw: Draw, tokens: int) -> Case:
        case = CASES[name](draw, tokens)
        return case._replace(floats=case.floats | {argument: case.floats[argument].to(dtype)})

    return make


HALF_CASES = {
    "product_key_address-bfloat16": halved("product_key_address", "query", torch.bfloat16),
    "key_commit-float16": halved("key_commit-masked", "query", torch.float16),
    "product_key_scan-bfloat16": halved("product_key_scan", "query", torch.bfloat16),
    "memory_read-float16": halved("memory_read", "weights", torch.float16),
    "memory_scan-packed-bfloat16": halved("memory_scan-packed", "targets", torch.bfloat16),
}
_ALL = CASES | {"memory_scan-indexed": indexed_case}
_ANY = _ALL | HALF_CASES
every_operator = pytest.mark.parametrize("make", _ALL.values(), ids=_ALL)
in_any_dtype = pytest.mark.parametrize("make", _ANY.values(), ids=_ANY)
in_half_precision = pytest.mark.parametrize("make", HALF_CASES.values(), ids=HALF_CASES)


def with_gradient(case: Case) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in case.floats.values()]


def floating(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x for x in outputs if x.is_floating_point())


def test_one_token_and_one_slot():
    """Views of one element have strides that kernels may take for gaps."""
    for seed in range(3):
        draw = Draw(seed)
        floats = {
            "values": draw.normal(N, DV),
            "weights": draw.normal(M, S, 1, 1),
            "coefficients": draw.normal(M, S, 1, 1),
            "targets": draw.normal(M, S, 1, DV),
            "gates": draw.uniform(M, S, 1),
        }
        case = Case(ops.memory_scan, floats, {"slots": draw.integers(2, M, S, 1, 1)})
        assert torch.autograd.gradcheck(case, with_gradient(case))


@every_operator
@pytest.mark.parametrize("seed", range(3))
def test_gradient_by_finite_differences(make, seed):
    case = make(Draw(seed), P)
    assert torch.autograd.gradcheck(lambda *floats: floating(case(*floats)), with_gradient(case))


@every_operator
def test_gradient_of_one_input_alone(make):
    """It is what it is where the other inputs have one too."""
    case = make(Draw(8), P)
    floats = with_gradient(case)
    want = torch.autograd.grad(sum(x.sin().sum() for x in floating(case(*floats))), floats)
    for i, gradient in enumerate(want):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(floats)]
        total = sum(x.sin().sum() for x in floating(case(*alone)))
        assert torch.equal(torch.autograd.grad(total, alone[i])[0], gradient)


@every_operator
@pytest.mark.parametrize("tokens", [P, 0])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_opcheck(make, tokens, requires_grad, layout, monkeypatch):
    """Every utility of ``torch.library.opcheck``, on the operator as the public function calls it."""
    case = make(Draw(0, torch.float32), tokens)
    if layout == "strided":
        case = spread(case)
    opcheck(case, requires_grad)


@in_half_precision
def test_opcheck_in_half_precision(make):
    opcheck(spread(make(Draw(0, torch.float32), P)), requires_grad=True)


def spread(case: Case) -> Case:
    """The same with gaps in its tensors."""
    return case._replace(
        floats={k: strided(x) for k, x in case.floats.items()},
        others={k: strided(x) if isinstance(x, Tensor) else x for k, x in case.others.items()},
    )


def opcheck(case: Case, requires_grad: bool) -> None:
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    floats = [x.requires_grad_(requires_grad) for x in case.floats.values()]
    with RecordOperators(calls):
        case(*floats)
    assert calls
    for operator, arguments in calls:
        arguments = tuple(
            a.detach().requires_grad_(requires_grad and a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in arguments
        )
        torch.library.opcheck(operator, arguments)


class RecordOperators(torch.utils._python_dispatch.TorchDispatchMode):
    """Collect the calls of our operators and their arguments."""

    def __init__(self, calls: list[tuple[Any, tuple[Any, ...]]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fwpkm":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@in_any_dtype
def test_backward_operator_opcheck(make):
    case = make(Draw(1, torch.float32), P)
    outputs = floating(case(*with_gradient(case)))
    calls = []
    with RecordOperators(calls):
        torch.autograd.backward(outputs, [torch.randn_like(x) for x in outputs])
    assert calls
    for operator, arguments in calls:
        torch.library.opcheck(operator, tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments))


@in_any_dtype
def test_strided_inputs_give_the_same(make):
    case = make(Draw(2), P)
    apart = spread(case)
    for have, want in zip(apart(*apart.floats.values()), case(*case.floats.values()), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


@in_any_dtype
def test_autocast_changes_nothing(make):
    """An operator computes in what its arguments are, forward and backward."""
    case, found = make(Draw(7, torch.float32), P), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            floats = with_gradient(case)
            outputs = case(*floats)
            total = sum(x.sin().sum() for x in floating(outputs))
            found.append([*outputs, *torch.autograd.grad(total, floats)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@in_any_dtype
@pytest.mark.unpoisoned
def test_bitwise_deterministic(make):
    case = make(Draw(3, torch.float32), 64)

    def run() -> list[Tensor]:
        floats = with_gradient(case)
        outputs = case(*floats)
        return [*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in floating(outputs)), floats)]

    first = run()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@every_operator
def test_one_graph_for_every_length(make):
    """Forward and backward in one graph, compiled once for lengths that differ."""
    compiled = None
    for tokens in (4, 6, 9):
        case = make(Draw(tokens), tokens)
        if compiled is None:
            compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
        eager, graph = with_gradient(case), with_gradient(case)
        want, have = floating(case(*eager)), floating(case._replace(function=compiled)(*graph))
        for pair in zip(
            (*have, *torch.autograd.grad(sum(x.sin().sum() for x in have), graph)),
            (*want, *torch.autograd.grad(sum(x.sin().sum() for x in want), eager)),
            strict=True,
        ):
            torch.testing.assert_close(*pair)


@every_operator
def test_double_backward_is_refused(make):
    case = make(Draw(4), P)
    floats = with_gradient(case)
    total = sum(x.square().sum() for x in floating(case(*floats)))
    grads = torch.autograd.grad(total, floats, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        sum(g.square().sum() for g in grads).backward()


@every_operator
def test_float32_within_tolerance_of_float64(make):
    """float32 forward within 1e-5 and gradients within 1e-4 of the same inputs in float64 (where the slots agree)."""
    case = make(Draw(5, torch.float32), P)
    narrow, wide = with_gradient(case), [x.double().requires_grad_() for x in case.floats.values()]
    have, want = case(*narrow), case(*wide)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)
    grads_have = torch.autograd.grad(sum(x.sin().sum() for x in floating(have)), narrow)
    grads_want = torch.autograd.grad(sum(x.sin().sum() for x in floating(want)), wide)
    for a, b in zip(grads_have, grads_want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def write_arguments(tokens: int) -> tuple[Tensor, ...]:
    draw = Draw(6, torch.float32)
    slots = draw.integers(N, tokens, TOPK)
    return draw.normal(N, DV), slots, draw.normal(tokens, TOPK), draw.normal(tokens, DV)


@pytest.mark.parametrize("tokens", [P, 0])
def test_write_opcheck(tokens):
    values, *rest = write_arguments(tokens)
    operator = torch.ops.fwpkm.memory_write_.default
    torch.library.opcheck(operator, (values, *rest))
    torch.library.opcheck(operator, (values, *map(strided, rest)))


def test_write_in_a_graph_is_in_place():
    """A compiled step that reads, writes and reads again changes the buffer itself, once for every length."""

    def step(values, slots, coefficients, residuals):
        before = ops.memory_read(values, slots, coefficients)
        ops.memory_write_(values, slots, coefficients, residuals)
        return before, ops.memory_read(values, slots, coefficients)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 7, 5):
        values, *rest = write_arguments(tokens)
        buffer = values.clone()
        have, want = compiled(buffer, *rest), step(values, *rest)
        assert torch.equal(buffer, values)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.unpoisoned
def test_write_is_bitwise_deterministic():
    values, *rest = write_arguments(64)
    first = ops.memory_write_(values.clone(), *rest)
    assert all(torch.equal(first, ops.memory_write_(values.clone(), *rest)) for _ in range(4))
