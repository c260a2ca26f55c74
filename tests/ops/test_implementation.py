"""Which implementation runs where, and what is said where none can."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fwpkm import ops
from tests.draws import Draw
from tests.ops.test_operators import P, RecordOperators, every_operator, floating, with_gradient

VALUES, SLOTS, WEIGHTS = torch.randn(9, 3), torch.zeros(4, 2, dtype=torch.int64), torch.randn(4, 2)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCED", "CHECKED"):
        monkeypatch.setattr(f"fwpkm.ops._implementation.{name}", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from fwpkm import ops
print(float(ops.memory_read(torch.ones(2, 3), torch.zeros(1, 1).long(), torch.ones(1, 1)).sum()))
try:
    ops.implementation("cuda")
except RuntimeError as error:
    print(error)
print("fwpkm.ops.kernels" in sys.modules)
"""


def test_without_triton():
    """Operators run on the CPU, and on CUDA say what is missing. In a process of its own: its modules are the point."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    total, message, last = result.stdout.splitlines()
    assert total == "3.0"
    for words in ("Triton is not installed", "pip install 'triton", "FWPKM_IMPL=reference"):
        assert words in message
    assert last == "False"


def test_what_the_environment_says():
    """It is read when the operators are imported."""
    script = "from fwpkm import ops; print(ops.implementation('cuda'), ops._implementation.checks_values())"
    said = os.environ | {"FWPKM_IMPL": "reference", "FWPKM_CHECK": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=said, check=True)
    assert result.stdout == "reference True\n"


def test_each_device_has_its_implementation(monkeypatch):
    assert ops.implementation("cpu") == "reference"
    assert ops.implementation(torch.device("cpu")) == "reference"
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "")
    assert ops.implementation("cpu") == "reference"
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "reference")
    assert ops.implementation("cuda:1") == ops.implementation("cpu") == "reference"
    with pytest.raises(ValueError, match="device is mps; expected a CPU or CUDA device"):
        ops.implementation("mps")


def test_kernels_are_for_cuda(monkeypatch):
    pytest.importorskip("triton")
    assert ops.implementation("cuda") == "triton"
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "triton")
    assert ops.implementation("cuda") == "triton"
    with pytest.raises(RuntimeError, match="on the CPU, where kernels are only interpreted: set TRITON_INTERPRET=1"):
        ops.memory_read(VALUES, SLOTS, WEIGHTS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.implementation("cpu") == "triton"


def test_an_unknown_implementation_is_an_error(monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "cuda")
    message = "FWPKM_IMPL is 'cuda'; expected 'reference' or 'triton'"
    with pytest.raises(ValueError, match=message):
        ops.implementation("cpu")
    with pytest.raises(ValueError, match=message):
        ops.memory_read(VALUES, SLOTS, WEIGHTS)


def test_every_operator_has_both():
    """Every operator is registered for CPU and CUDA tensors, and says where its kernels will be found."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fwpkm::")}
    assert len(names) == 16
    for name in names:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


@pytest.mark.gpu
def test_reference_on_a_gpu(monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "reference")
    have = ops.memory_read(VALUES.cuda(), SLOTS.cuda(), WEIGHTS.cuda())
    torch.testing.assert_close(have.cpu(), ops.memory_read(VALUES, SLOTS, WEIGHTS))


@every_operator
def test_compositions_make_tensors_where_their_arguments_are(make):
    """So that they run on any device, here while the default one is another."""
    case, calls = make(Draw(0, torch.float32), P), []
    with RecordOperators(calls):
        outputs = floating(case(*with_gradient(case)))
        torch.autograd.backward(outputs, [x.detach() for x in outputs])
    assert len(calls) >= 2
    for operator, arguments in calls:
        name, backward, _ = operator._opname.partition("_backward")
        composition = getattr(sys.modules[f"fwpkm.ops.{name}"], "_backward_cpu" if backward else "_cpu")
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        want = composition(*arguments)
        with torch.device("meta"):
            torch.testing.assert_close(composition(*arguments), want, rtol=0, atol=0)
