"""The scan's CUDA implementation, interpreted, against the CPU operator in float64 and the reference."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fwpkm import reference
from fwpkm.ops.cuda import memory_scan
from tests.draws import Draw, seeds, strided

CUDA = memory_scan.forward, memory_scan.backward
NO_INDEX = (0, None, [])  # the forward's last arguments, which are not for kernels
OPERATORS = torch.ops.fwpkm.memory_scan.default, torch.ops.fwpkm.memory_scan_backward.default
INPUTS = ("values", "slots", "weights", "coefficients", "targets", "gates")
LOG = ("log_slots", "log_coefficients", "log_residuals", "log_chunks", "log_lengths", "lookahead")
ALL = (*INPUTS, *LOG, "sequences", "cut", "residual_dtype")


class Size(NamedTuple):
    """Of a scan, and of what it starts from: ``records`` None is no log, ``n_sequences`` 0 no sequences."""

    memories: int = 2
    steps: int = 3
    tokens: int = 4
    fanout: int = 3
    n: int = 7
    width: int = 5
    records: int | None = None
    lookahead: int = 1
    log_dtype: torch.dtype = torch.float32
    n_sequences: int = 0
    cut: bool = False

    @property
    def plain(self) -> bool:
        return self.records is None and not self.n_sequences and not self.cut


sizes = st.builds(
    Size,
    memories=st.integers(1, 2),
    steps=st.integers(0, 4),
    tokens=st.integers(0, 4),
    fanout=st.integers(1, 5),
    n=st.integers(1, 12),
    width=st.sampled_from([1, 3, 16, 33, 40]),
    records=st.none() | st.integers(0, 9),
    lookahead=st.integers(0, 3),
    log_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    n_sequences=st.integers(0, 3),
    cut=st.booleans(),
)


def draw_scan(draw: Draw, size: Size) -> dict[str, Any]:
    """The operator's arguments by name, in float32. What a log holds beyond its lengths is NaN, and other rubbish."""
    draw.dtype = torch.float32
    memories, steps, tokens, fanout, n, width, records, *_ = size
    shape = (memories, steps, tokens, fanout)
    named: dict[str, Any] = dict.fromkeys(ALL) | {
        "values": draw.normal(n, width),
        "slots": draw.integers(n, *shape),
        "weights": draw.normal(*shape),
        "coefficients": draw.normal(*shape) * 0.3,
        "targets": draw.normal(*shape[:3], width),
        "gates": draw.uniform(*shape[:3]),
        "lookahead": size.lookahead,
        "residual_dtype": torch.float32,
    }
    if records is not None:
        lengths = draw.integers(records + 1, memories)
        beyond = torch.arange(records) >= lengths.unsqueeze(1)
        named |= {
            "log_slots": draw.integers(n + 1, memories, records, fanout) - 1,
            "log_coefficients": draw.normal(memories, records, fanout),
            "log_residuals": draw.normal(memories, records, width).to(size.log_dtype),
            "log_chunks": (torch.arange(records) // 3 * 7 + 2**40).repeat(memories, 1),
            "log_lengths": lengths,
        }
        for name in ("log_coefficients", "log_residuals", "log_chunks"):
            rubbish = torch.nan if named[name].is_floating_point() else 2**62
            named[name][beyond] = rubbish
    if size.n_sequences:
        # numbers far apart: what may not be told from sizes
        numbers = torch.tensor([0, 3, 10**6])[: size.n_sequences]
        named["sequences"] = numbers[draw.integers(size.n_sequences, *shape[:3])]
    if size.cut:
        named["cut"] = torch.tensor([-1, -1, 0, 3, 10**6])[draw.integers(5, memories, steps)]
    return named


def widen(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def wide(named: dict[str, Any]) -> dict[str, Any]:
    """In float64, in which nothing is rounded; residuals of a log keep their dtype, unless that is float32."""
    return {k: widen(x) for k, x in named.items()} | {"residual_dtype": torch.float64}


def run(forward: Any, backward: Any, named: dict[str, Any], grad_out: Tensor, values_need_grad: bool) -> list[Tensor]:
    """The outputs of a scan and its gradients."""
    values, *others = named.values()
    outputs = forward(values, *others, *NO_INDEX)
    return [*outputs, *backward(grad_out, *outputs, *others, values.shape[0], values_need_grad)]


OUTPUTS = (
    *("out", "rows", "local"),
    *("grad weights", "grad coefficients", "grad targets", "grad gates"),
    *("grad log_coefficients", "grad log_residuals", "grad values"),
)


def compare(have: list[Tensor], want: list[Tensor], tolerance: float = 1e-4) -> None:
    for name, a, b in zip(OUTPUTS, have, want, strict=True):
        assert a.shape == b.shape, name
        assert a.is_contiguous(), name
        if not a.is_floating_point():
            assert torch.equal(a, b), name
            continue
        assert a.dtype == torch.float32 or b.dtype == a.dtype == torch.bfloat16, name
        close = tolerance if a.dtype == torch.float32 else 2**-7  # a gradient in bfloat16 may round the other way
        scale = b.double().abs().max().clamp_min(1) if b.numel() else 1
        assert_close(a.double(), b.double(), rtol=close, atol=float(close * scale), msg=lambda m, n=name: f"{n}: {m}")


@given(seed=seeds, size=sizes, values_need_grad=st.booleans())
@example(seed=0, size=Size(steps=0, records=3, cut=True, n_sequences=2), values_need_grad=True)
@example(seed=0, size=Size(tokens=0, records=3, cut=True, n_sequences=2), values_need_grad=True)
@example(seed=0, size=Size(records=0), values_need_grad=False)
@example(seed=1, size=Size(1, 2, 1, 128, 200, 40), values_need_grad=True)
@example(seed=1, size=Size(1, 2, 2, 2, 5, 1100), values_need_grad=False)
def test_scan(seed, size, values_need_grad):
    draw = Draw(seed)
    named = draw_scan(draw, size)
    grad_out = draw.normal(*named["targets"].shape)
    have = run(*CUDA, named, grad_out, values_need_grad)
    compare(have, run(*OPERATORS, wide(named), grad_out.double(), values_need_grad))
    if size.plain and size.steps:  # the reference takes at least one chunk
        leaves = [named[name].double().requires_grad_() for name in INPUTS if name != "slots"]
        want, _ = reference.memory_scan(leaves[0], named["slots"], *leaves[1:])
        assert_close(have[0].double(), want.detach(), rtol=1e-4, atol=1e-4)
        if want.numel():
            of_values, *grads = torch.autograd.grad(want, leaves, grad_out.double(), materialize_grads=True)
            for a, b in zip(have[3:7], grads, strict=True):
                assert_close(a.double(), b, rtol=1e-4, atol=float(1e-4 * b.abs().max().clamp_min(1)))
            if values_need_grad:
                assert_close(have[9].double(), of_values, rtol=1e-4, atol=float(1e-4 * of_values.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounded_residuals(dtype):
    """On numbers of few bits all but the rounding of residuals is exact, whatever the order of sums: the bits agree.
    And the backward undoes the very residuals that were written.
    """
    draw = Draw(0)
    named = draw_scan(draw, Size(steps=2, width=16)) | {"residual_dtype": dtype}
    for name in ("values", "weights", "coefficients", "targets"):
        named[name] = (named[name] * 4).round() / 4
    named["gates"] = (named["gates"] * 64).round() / 64
    grad_out = draw.normal(*named["targets"].shape)
    have, want = (run(*both, named, grad_out, True) for both in (CUDA, OPERATORS))
    if dtype == torch.bfloat16:  # which the interpreter rounds towards zero
        compare(have, want, 2**-6)
    else:
        assert all(torch.equal(a, b) for a, b in zip(have[:3], want[:3], strict=True))
        compare(have, want)
    unrounded = run(*OPERATORS, named | {"residual_dtype": torch.float32}, grad_out, True)
    assert torch.equal(unrounded[0], have[0]) == (dtype in (torch.float32, torch.float64))


def test_hot_row():
    """One row hit by every read of every token: its sums go through several pieces."""
    draw = Draw(0)
    named = draw_scan(draw, Size(1, 3, 70, 2, 3, 6, records=70, cut=True))
    named["slots"].fill_(1)
    named["slots"][0, 1, ::3] = 2
    named["log_slots"].clamp_(max=1)
    for name in WEIGHTS:
        named[name] /= 70
    grad_out = draw.normal(*named["targets"].shape)
    have = run(*CUDA, named, grad_out, True)
    compare(have, run(*OPERATORS, wide(named), grad_out.double(), True))


WEIGHTS = ("weights", "coefficients")
FULL = Size(records=9, n_sequences=2, cut=True, log_dtype=torch.bfloat16)


def test_strided_inputs():
    draw = Draw(2)
    named = draw_scan(draw, FULL)
    grad_out = draw.normal(*named["targets"].shape)
    want = run(*CUDA, named, grad_out, True)
    apart = {k: strided(x) if isinstance(x, Tensor) else x for k, x in named.items()}
    have = run(*CUDA, apart, strided(grad_out), True)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.unpoisoned
def test_the_same_bits_again():
    draw = Draw(3)
    named = draw_scan(draw, FULL)
    grad_out = draw.normal(*named["targets"].shape)
    first = run(*CUDA, named, grad_out, True)
    again = run(*CUDA, named, grad_out, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_chunk_passes_its_rows_on():
    """What ``rows`` holds is the version that the last chunk read, with padding of zeros after it."""
    named = draw_scan(Draw(4), Size(1, 2, 3, 2, 4, 5))
    values, *others = named.values()
    _, rows, local = memory_scan.forward(values, *others, *NO_INDEX)
    used = local.max() + 1
    before, slots = named["values"].double(), named["slots"][:, :1]
    first = {k: v if k == "values" else v[:, :1] for k, v in named.items() if k in INPUTS}
    _, final = reference.memory_scan(**first | {"slots": slots, "values": before})
    distinct = named["slots"].unique()
    assert used == distinct.numel() < rows.shape[0]
    assert_close(rows[:used].double(), final[0, distinct], rtol=1e-5, atol=1e-5)
    assert not rows[used:].any()


@pytest.mark.parametrize("wrong", [4, -1, 2**50])
def test_a_slot_out_of_range_is_nobodys(wrong):
    """It reads zeros and changes nothing that others read, in its memory or the next one."""
    draw = Draw(8)
    named = draw_scan(draw, Size(2, 2, 3, 2, 4, 5))
    grad_out = draw.normal(*named["targets"].shape)
    at = (0, 0, 1, 0)
    without = {name: named[name].index_put([torch.tensor(i) for i in at], torch.tensor(0.0)) for name in WEIGHTS}
    want = run(*CUDA, named | without, grad_out, True)
    have = run(
        *CUDA,
        named | {"slots": named["slots"].index_put([torch.tensor(i) for i in at], torch.tensor(wrong))},
        grad_out,
        True,
    )
    for i in (0, 5, 6, 9):
        assert_close(have[i], want[i], msg=lambda m, i=i: f"{OUTPUTS[i]}: {m}")


@pytest.mark.parametrize("own_values", [False, True])
def test_each_sample_of_a_batch(own_values, monkeypatch):
    """Under vmap the working rows of all samples are in one table, which is taken apart and put together again."""
    draw = Draw(5)
    samples = [draw_scan(draw, Size(1, 2, 2, 2, 3, 4, records=4, n_sequences=2)) for _ in range(3)]
    names = [name for name, x in samples[0].items() if isinstance(x, Tensor)]
    batch = [torch.stack([sample[name] for sample in samples]) for name in names]
    if not own_values:
        batch[0] = samples[0]["values"]
    sought = ("values", "weights", "coefficients", "targets", "gates", "log_coefficients", "log_residuals")

    def total(*tensors: Tensor) -> Tensor:
        named = samples[0] | dict(zip(names, tensors, strict=True))
        return OPERATORS[0](*named.values(), *NO_INDEX)[0].sin().sum()

    gradients = torch.func.vmap(
        torch.func.grad(total, tuple(map(names.index, sought))), (0 if own_values else None, *[0] * (len(names) - 1))
    )
    want = gradients(*batch)
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")
    for name, have, wanted in zip(sought, gradients(*batch), want, strict=True):
        assert_close(have, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")
    draw = Draw(7)
    named = draw_scan(draw, Size(1, 2, 2, 2, 4, 3, records=4, n_sequences=2, cut=True))
    for name in ("log_coefficients", "log_residuals"):
        named[name].nan_to_num_()  # or nothing compares equal
    grad_out = draw.normal(*named["targets"].shape)
    for x in named.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_(requires_grad)
    values, *others = named.values()
    torch.library.opcheck(OPERATORS[0], (values, *others, *NO_INDEX))
    values, *others = (x.detach() if isinstance(x, Tensor) else x for x in named.values())
    torch.library.opcheck(
        OPERATORS[1], (grad_out, *OPERATORS[0](values, *others, *NO_INDEX), *others, values.shape[0], True)
    )


def test_a_log_goes_with_sequence_0():
    """Which may have no token in a call; the lowest number that has is another."""
    named = draw_scan(Draw(10), Size(records=9, n_sequences=1))
    named["log_lengths"].fill_(9)
    without = dict.fromkeys(LOG[:-1])
    for number in (0, 3):
        named["sequences"].fill_(number)
        (have, *_), (bare, *_) = (memory_scan.forward(*x.values(), *NO_INDEX) for x in (named, named | without))
        assert torch.equal(have, bare) == (number > 0)


def test_an_index_is_for_the_cpu():
    named = draw_scan(Draw(9), Size(1, 1, 2, 2, 4, 5))
    values, *others = named.values()
    with pytest.raises(ValueError, match="log is an IndexedLog; expected a Log"):
        memory_scan.forward(values, *others, 4, torch.zeros(1, 2, 5), [])


class NothingAskedOfTheGpu(TorchDispatchMode):
    """Fail on what would make the host wait for numbers on a GPU."""

    waiting = "local_scalar_dense|nonzero|unique|masked_select|equal|is_nonzero|repeat_interleave"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].strip("_")
        by_index = name in ("index", "index_put", "index_put_impl")
        masks = [x for x in (args[1] if by_index else ()) if x is not None and x.dtype in (torch.bool, torch.uint8)]
        if masks or re.match(self.waiting, name):
            raise AssertionError(f"the host waits for {name}")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing():
    draw = Draw(6)
    named = draw_scan(draw, FULL)
    grad_out = draw.normal(*named["targets"].shape)
    with NothingAskedOfTheGpu():
        run(*CUDA, named, grad_out, True)
    for ask in (Tensor.item, Tensor.unique, Tensor.nonzero, lambda x: x[x > 0], lambda x: bool(x.sum() > 0)):
        with pytest.raises(AssertionError, match="waits"), NothingAskedOfTheGpu():
            ask(torch.ones(1))
