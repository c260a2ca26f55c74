"""The gated delta rule against its definition, token by token, and transformers' own; and what it runs on a GPU."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from fwpkm import ops
from tests.draws import Draw, seeds

CHUNK = sys.modules["fwpkm.ops.gated_delta_rule"].CHUNK
BLOCK = sys.modules["fwpkm.ops.gated_delta_rule"].BLOCK * CHUNK
LENGTHS = [0, 1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9]


def plain(query, key, value, decay, beta, state=None) -> tuple[Tensor, Tensor]:
    """Token by token, by the definition."""
    heads = value.shape[2] // query.shape[2]
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(heads, dim=2) for x in (query / query.shape[3] ** 0.5, key))
    if state is None:
        state = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    out = [value.new_zeros(value.shape[0], 0, *value.shape[2:])]
    for t in range(value.shape[1]):
        state = state * decay[:, t].exp()[..., None, None]
        residual = value[:, t] - (state * key[:, t].unsqueeze(-1)).sum(-2)
        state = state + (beta[:, t].unsqueeze(-1) * key[:, t]).unsqueeze(-1) * residual.unsqueeze(-2)
        out.append((state * query[:, t].unsqueeze(-1)).sum(-2).unsqueeze(1))
    return torch.cat(out, 1), state


def draw_inputs(
    draw: Draw, length: int, groups: int = 1, fresh: bool = False, masked: bool = False, packed: bool = False
) -> list[Tensor]:
    """Of two rows and two key heads; some tokens that change nothing, and some that see nothing before them."""
    heads = 2 * groups
    decay, beta = -2 * draw.uniform(2, length, heads), draw.uniform(2, length, heads)
    if packed:
        decay = decay.masked_fill((draw.uniform(2, length) < 0.3).unsqueeze(-1), -128)
    if masked:
        mask = (draw.uniform(2, length) < 0.3).unsqueeze(-1)
        decay, beta = decay.masked_fill(mask, 0), beta.masked_fill(mask, 0)
    inputs = [draw.normal(2, length, 2, 3), draw.normal(2, length, 2, 3), draw.normal(2, length, heads, 5), decay, beta]
    return inputs if fresh else [*inputs, draw.normal(2, heads, 3, 5)]


def results(rule, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients that both of them send (zero where there is no token)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = rule(*inputs)
    total = sum(x.sin().sum() for x in outputs) + sum(0 * x.sum() for x in inputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


@given(
    seed=seeds,
    length=st.one_of(st.sampled_from(LENGTHS), st.integers(0, 3 * CHUNK)),
    groups=st.integers(1, 2),
    fresh=st.booleans(),
    masked=st.booleans(),
    packed=st.booleans(),
)
def test_rule_of_each_token(seed, length, groups, fresh, masked, packed):
    """Outputs, the last state and all gradients."""
    inputs = draw_inputs(Draw(seed), length, groups, fresh, masked, packed)
    assert_close(results(ops.gated_delta_rule, inputs), results(plain, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [BLOCK + CHUNK, 2 * BLOCK + 5])
def test_blocks_leave_no_seams(length):
    inputs = draw_inputs(Draw(length), length, fresh=False, packed=True)
    assert_close(results(ops.gated_delta_rule, inputs), results(plain, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_gradient_by_finite_differences_across_chunks(length):
    inputs = [x.requires_grad_() for x in draw_inputs(Draw(length), length)]
    assert torch.autograd.gradcheck(ops.gated_delta_rule, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 50, 150])
def test_transformers_rule(dtype, length):
    draw = Draw(length, torch.float32)
    inputs = draw_inputs(draw, length, groups=2)
    inputs = [x.to(dtype) if i < 3 or i == 4 else x for i, x in enumerate(inputs)]
    rule = torch_recurrent_gated_delta_rule if length == 1 else torch_chunk_gated_delta_rule

    def theirs(query, key, value, decay, beta, state):
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        heads = value.shape[2] // key.shape[2]  # which older versions of theirs want repeated
        query, key = (x.repeat_interleave(heads, dim=2) for x in (query, key))
        return rule(query, key, value, g=decay, beta=beta, **options)

    have, want = results(ops.gated_delta_rule, inputs), results(theirs, inputs)
    assert have[0].dtype == dtype
    assert [x.dtype for x in have] == [x.dtype for x in want]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if length == 1:  # where the state of theirs is rounded to bfloat16
        tolerance *= 2
    assert_close(have, want, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_float32_forgets_as_float64_does():
    """After many tokens that see nothing before them, sums of decays are in the thousands."""
    inputs = draw_inputs(Draw(0), 2 * CHUNK, packed=True)
    have, want = results(ops.gated_delta_rule, [x.float() for x in inputs]), results(plain, inputs)
    for a, b in zip(have, want, strict=True):
        assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_a_state_is_not_written():
    inputs = draw_inputs(Draw(1), 5)
    for length in (0, 1, 5):
        pieces = [x[:, :length] for x in inputs[:5]]
        before = inputs[5].clone()
        _, state = ops.gated_delta_rule(*pieces, inputs[5])
        assert torch.equal(inputs[5], before)
        assert state.data_ptr() != inputs[5].data_ptr()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.unpoisoned)])
def test_one_graph_for_every_length(backend):
    """Across chunks too, with what a layer does around the operator."""

    def around(query, key, value, decay, beta, state):
        out, state = ops.gated_delta_rule(query.sin(), key, value, -decay.exp(), beta.sigmoid(), state)
        return out.cos() * 2, state + 1

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(around, fullgraph=True, dynamic=True, backend=backend)
    for length in (CHUNK - 4, CHUNK + 9, 7, 3 * CHUNK):
        inputs = draw_inputs(Draw(length), length)
        assert_close(results(compiled, inputs), results(around, inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Rule(torch.autograd.Function):
    """As that of flash-linear-attention is: all of it in one function of autograd."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return plain(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        composition = sys.modules["fwpkm.ops.gated_delta_rule"]._backward_cpu  # tested above
        return composition(*grads, *inputs, *[None] * (6 - len(inputs)))[: len(inputs)]


@pytest.fixture
def flash_linear_attention(monkeypatch):
    """A stand-in that computes by the definition; what it was asked for."""
    asked = []

    def make(name):
        def rule(
            q, k, v, g=None, beta=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False
        ):
            assert output_final_state
            assert use_qk_l2norm_in_kernel
            asked.append(name)
            inputs = (q, k, v, g, beta)
            return Rule.apply(*inputs, *(() if initial_state is None else (initial_state,)))

        return rule

    package, operators, rules = ModuleType("fla"), ModuleType("fla.ops"), ModuleType("fla.ops.gated_delta_rule")
    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        setattr(rules, name, make(name))
    package.ops, operators.gated_delta_rule = operators, rules
    for module in (package, operators, rules):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("length", [0, 1, 9])
def test_kernels_of_flash_linear_attention(flash_linear_attention, monkeypatch, kernels, length, fresh):
    """What is given to them and comes back, forward and backward through the operator."""
    inputs = [x.float() for x in draw_inputs(Draw(length), length, groups=2, fresh=fresh)]
    have = results(ops.gated_delta_rule, inputs)
    forward = "fused_recurrent_gated_delta_rule" if length == 1 else "chunk_gated_delta_rule"
    assert flash_linear_attention == ([forward, "chunk_gated_delta_rule"] if length else [])
    assert_close(have, results(plain, inputs), rtol=1e-4, atol=1e-5)


def test_without_flash_linear_attention(monkeypatch, kernels):
    monkeypatch.setitem(sys.modules, "fla", None)
    inputs = [x.float() for x in draw_inputs(Draw(0), 3)]
    with pytest.raises(RuntimeError, match=r"pip install 'fwpkm\[fla\]', or set FWPKM_IMPL=reference"):
        ops.gated_delta_rule(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 100])
def test_on_a_gpu(length):
    pytest.importorskip("fla")
    draw = Draw(length, torch.float32)
    shapes = [(2, length, 2, 32), (2, length, 2, 32), (2, length, 4, 64)]
    inputs = [draw.normal(*shape) for shape in shapes]
    inputs += [-draw.uniform(2, length, 4), draw.uniform(2, length, 4), draw.normal(2, 4, 32, 64)]
    want = results(plain, [x.double() for x in inputs])
    for have, x in zip(results(ops.gated_delta_rule, [x.cuda() for x in inputs]), want, strict=True):
        assert_close(have.cpu().double(), x, rtol=2e-2, atol=2e-2)
