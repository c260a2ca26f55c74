"""``fwpkm.compile.audit`` names what was planted, and finds nothing where nothing is."""

import inspect
import json
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from fwpkm import ops
from fwpkm.compile import audit
from fwpkm.compile.measure import compare
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM
from tests.children import CONFIG
from tests.draws import Draw

SLOTS, WIDTH = 256, 32
LIBRARY = torch.library.Library("audited", "DEF")


def line_of(function, text):
    """Where ``text`` stands in the code of ``function``."""
    lines, first = inspect.getsourcelines(function)
    (found,) = (first + i for i, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(function)}:{found}"


def ends(where, full):
    return bool(where) and full.endswith(where)


class Memory(nn.Module):
    """A projection, and a buffer to do something with."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("values", Draw(0, torch.float32).normal(SLOTS, WIDTH))

    def forward(self, x, slots, **options):
        return self.use(self.values, self.projection(x), slots, **options)


def inputs(tokens=5, **options):
    draw = Draw(tokens, torch.float32)
    return {"x": draw.normal(tokens, WIDTH), "slots": draw.integers(SLOTS, tokens, 4), **options}


def broken(values, x, slots):
    x = x + 1
    torch._dynamo.graph_break()  # planted
    return x * 2


def broken_in_a_loop(values, x, slots):
    for _ in range(2):
        x = x + 1
        torch._dynamo.graph_break()  # planted
    return x * 2


def called(values, x, slots):
    return broken(values, x, slots) + 1


@pytest.mark.parametrize(("use", "at"), [(broken, broken), (broken_in_a_loop, broken_in_a_loop), (called, broken)])
def test_a_break_is_named_with_its_line(use, at):
    result = audit(Memory(use), inputs(), training=False)
    assert not result.clean
    (found,) = result.breaks
    assert "graph_break()" in found.reason
    assert ends(found.where, line_of(at, "# planted"))


class Loop(nn.Module):
    """Has no call around the break from which torch could go on."""

    def forward(self, x):
        for _ in range(2):
            torch._dynamo.graph_break()  # planted
        return x * 2


def test_a_function_that_is_not_compiled_at_all_is_named():
    result = audit(Loop(), {"x": inputs()["x"]}, training=False)
    (found,) = result.breaks
    assert result.graphs == ()
    assert "graph_break()" in found.reason
    assert ends(found.where, line_of(Loop.forward, "# planted"))


def test_a_function_that_recompiles_too_often_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["fwpkm.compile.audit"], "_LIMIT", 2)
    result = audit(Memory(repeated), [inputs(times=n) for n in (2, 3, 4)], training=False)
    assert len(result.graphs) == 2
    (found,) = result.breaks
    assert "recompile limit exceeded" in found.reason
    assert [recompile.input for recompile in result.recompiles] == [1, 2]


def test_the_calls_that_lead_to_a_break():
    (found,) = audit(Memory(called), inputs(), training=False).breaks
    assert found.stack[-1] == found.where
    assert ends(found.stack[-2], line_of(called, "return broken"))


def repeated(values, x, slots, times):
    for _ in range(times):
        x = x.sin()
    return x


def test_a_recompile_is_named_with_its_guard_and_input():
    result = audit(Memory(repeated), [inputs(times=2), inputs(times=3), inputs(times=3)], training=False)
    assert result.clean
    assert [graph.input for graph in result.graphs] == [0, 1]
    assert [graph.aten_calls for graph in result.graphs] == [3, 4]
    (recompile,) = result.recompiles
    assert recompile.input == 1
    assert recompile.guards.startswith("0/0: options['times'] == 2")
    assert recompile.function.startswith("forward (")


def test_shapes_that_vary_recompile_once():
    result = audit(Memory(lambda values, x, slots: x * 2), [inputs(n) for n in (5, 7, 9, 11)], training=True)
    (recompile,) = result.recompiles
    assert recompile.input == 1
    assert "size mismatch at index 0. expected 5, actual 7" in recompile.guards
    assert [(graph.input, graph.phase) for graph in result.graphs] == [
        (0, "forward"),
        (0, "backward"),
        (1, "forward"),
        (1, "backward"),
    ]


def cloned(values, x, slots):
    return ops.memory_read(values.t().contiguous(), slots % WIDTH, x[:, :4])  # planted


def written_elsewhere(values, x, slots):
    return values.index_put((slots[:, 0],), x)  # planted


def cast(values, x, slots):
    return values.double() @ x[0].double()  # planted


def scaled(values, x, slots):
    return values[slots[:, 0]] + (values * x.mean()).sum()  # planted


def read_before_it_is_written(values, x, slots):
    before = values.t()
    again = before.clone()
    ops.memory_write_(values, slots, x[:, :4].detach(), x.detach())
    return again.sum() + x


@pytest.mark.parametrize("use", [cloned, written_elsewhere, cast, scaled])
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_is_named_with_its_line(use, training):
    result = audit(Memory(use), inputs(), training)
    assert not result.clean
    assert not result.breaks
    assert {x.tensor for x in result.copies} == {"values"}
    assert all(x.bytes in (SLOTS * WIDTH * 4, SLOTS * WIDTH * 8) for x in result.copies)
    assert any(ends(x.where, line_of(use, "# planted")) for x in result.copies)


@pytest.mark.parametrize("training", [False, True])
def test_a_write_that_cannot_be_in_place(training):
    result = audit(Memory(read_before_it_is_written), inputs(), training)
    assert [(x.operator, x.tensor) for x in result.copies] == [("aten::clone", "values"), ("aten::copy_", "values")]
    assert all(x.where.split(":")[0].endswith("ops/memory_write.py") for x in result.copies)


def written_in_place(values, x, slots):
    ops.memory_write_(values, slots, x[:, :4].detach(), x.detach())
    return ops.memory_read(values, slots, x[:, :4])


def scaled_in_place(values, x, slots):
    values.mul_(0.5)
    return x


def assigned_in_place(values, x, slots):
    values[slots[:, 0]] = x.detach()
    return x


def only_read(values, x, slots):
    return (
        ops.memory_read(values, slots, x[:, :4])
        + values[slots[:, 0]]
        + (x @ values.t())[:, :1]
        + values[:4].clone().sum()
    )


@pytest.mark.parametrize("use", [written_in_place, scaled_in_place, assigned_in_place, only_read])
@pytest.mark.parametrize("training", [False, True])
def test_what_copies_nothing_is_clean(use, training):
    result = audit(Memory(use), inputs(), training)
    assert result.clean, result.to_json()
    assert len(result.graphs) == 1 + training


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_a_copy_of_a_parameter_in_the_backward():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x @ weight

        @staticmethod
        def backward(ctx, grad):
            (weight,) = ctx.saved_tensors
            return grad @ torch.cat((weight, weight)).t()[:, :WIDTH], None  # planted

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, SLOTS))

        def forward(self, x):
            return Doubled.apply(self.first(x), self.table)

    result = audit(Model(), {"x": inputs()["x"]}, training=True)
    (found,) = result.copies
    assert (result.graphs[found.graph].phase, found.tensor) == ("backward", "table")


def define(name, schema="(Tensor x) -> Tensor", result=torch.sin):
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, result, "CPU")
    return getattr(torch.ops.audited, name).default


@pytest.fixture(scope="module")
def operators():
    without_fake, without_backward = define("without_fake"), define("without_backward")
    whole, numbers = define("whole"), define("numbers", result=lambda x: x.long())
    for name in ("without_backward", "whole", "numbers"):
        torch.library.register_fake(
            f"audited::{name}",
            lambda x, n=name: x.new_empty(x.shape, dtype=torch.int64 if n == "numbers" else None),
            lib=LIBRARY,
        )
    for operator in (without_fake, whole):
        torch.library.register_autograd(operator, lambda ctx, grad: grad, lib=LIBRARY)

    @torch.library.custom_op("audited::function", mutates_args=())
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    function.register_fake(torch.empty_like)
    return {
        "without_fake": without_fake,
        "without_backward": without_backward,
        "whole": whole,
        "numbers": numbers,
        "function": function,
    }


@pytest.mark.parametrize(
    ("name", "fake", "backward"),
    [
        ("without_fake", False, True),
        ("without_backward", True, False),
        ("function", True, False),
        ("whole", True, True),
        ("numbers", True, None),
    ],
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_say_what_they_lack(operators, name, fake, backward, training):
    operator = operators[name]
    result = audit(Memory(lambda values, x, slots: operator(x) + operator(x * 2) + x), inputs(), training)
    (found,) = result.operators
    assert (found.name, found.calls, found.fake, found.backward) == (f"audited::{name}", 2, fake, backward)
    assert result.clean == (fake and backward is not False)
    assert result.gradients == (training and backward is not False)
    if fake:
        assert result.graphs[0].operators == {f"audited::{name}": 2}
    else:
        assert any("fake tensors" in x.reason for x in result.breaks)


def model(**fields):
    """One block, with a memory that is large enough to count."""
    one = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "fwpkm_layers": [0]}
    large = {"fwpkm_n_subkeys": 24, "fwpkm_value_dim": 16}
    return FwPKMForCausalLM(FwPKMConfig(**CONFIG | one | large | fields))


def tokens(length, training):
    x = torch.randint(100, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": x} | ({"labels": x} if training else {})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_a_model_with_memories_is_clean(scope, training):
    subject = model(fwpkm_scope=scope)
    before = {name: x.clone() for name, x in subject.state_dict().items()}
    result = audit(subject, tokens(16, training), training)
    assert result.clean, result.to_json()
    assert [graph.phase for graph in result.graphs] == (["forward", "backward"] if training else ["inference"])
    called = {}
    for graph in result.graphs:
        for name, calls in graph.operators.items():
            called[name] = called.get(name, 0) + calls
    assert called == {x.name: x.calls for x in result.operators}
    assert called["fwpkm::memory_scan"] == 1
    assert ("fwpkm::memory_scan_backward" in called) == training
    # the model has seen nothing of it
    assert all(memory.pending is None or not memory.pending.writes[0].numel() for memory in subject.memories())
    assert all(x.grad is None for x in subject.parameters())
    assert all(torch.equal(x, before[name]) for name, x in subject.state_dict().items())


def test_caches_among_the_inputs_stay_as_they_are():
    subject = model().eval()
    with torch.no_grad():
        cache = subject(**tokens(8, False), use_cache=True).past_key_values
    audit(subject, tokens(4, False) | {"past_key_values": cache})
    assert cache.get_seq_length() == 8


def test_table_and_json():
    result = audit(
        Memory(lambda values, x, slots: broken(values, cloned(values, x, slots), slots)),
        [inputs(5), inputs(7)],
        training=False,
    )
    assert result.breaks
    assert result.recompiles
    assert result.copies
    data = result.to_json()
    assert (data["clean"], data["cost"]) == (False, None)
    assert json.loads(json.dumps(data))["recompiles"][0]["input"] == 1
    assert [x["where"] for x in data["breaks"]] == [x.where for x in result.breaks]
    console = Console(width=400)
    with console.capture() as shown:
        console.print(result.table())
    lines = shown.get().splitlines()
    assert any("breaks" in line and result.breaks[0].where in line for line in lines)
    assert any("recompiles" in line and "expected 5, actual 7" in line for line in lines)
    assert any("copies" in line and f"of values, {SLOTS * WIDTH * 4:,} bytes" in line for line in lines)
    assert any(f"fwpkm::memory_read × {result.operators[0].calls}" in line for line in lines)
    assert sum(" ATen calls" in line for line in lines) == len(result.graphs)


@pytest.mark.unpoisoned
def test_cost():
    result = audit(
        Memory(lambda values, x, slots: (values * 2 + x.sum()).sum()), inputs(), training=False, measure=True
    )
    cost = result.cost
    assert cost.eager_seconds > 0
    assert cost.compiled_seconds > 0
    assert cost.eager_bytes >= 2 * SLOTS * WIDTH * 4  # two results at once; compiled there is none
    assert cost.compiled_bytes < SLOTS * WIDTH * 4
    assert audit(Memory(only_read), inputs(), training=False).cost is None


def test_memory_is_what_a_step_holds_at_once():
    def one():
        a = torch.zeros(1000)
        del a
        torch.zeros(3000)

    def both():
        a = torch.zeros(1000)
        return torch.zeros(3000) if a is not None else None

    cost = compare(one, both, torch.device("cpu"))
    assert cost.eager_bytes == 12000
    assert cost.compiled_bytes == 16000


@pytest.mark.parametrize(("given", "message"), [([], r"inputs is \[\]; expected keyword arguments")])
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        audit(Memory(only_read), given)
    with pytest.raises(ValueError, match="model is compiled; expected the module itself"):
        audit(torch.compile(Memory(only_read)), inputs())
