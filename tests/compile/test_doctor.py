"""``fwpkm doctor``, as a user calls it, and what it knows of the machine."""

import json
import platform
import re
import runpy
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import fwpkm
from fwpkm import __version__
from fwpkm.compile import environment
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM
from tests.children import CONFIG
from tests.test_commands import run

ONE = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "fwpkm_layers": [0], "fwpkm_n_subkeys": 24}
LARGE = {"fwpkm_value_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    FwPKMForCausalLM(FwPKMConfig(**CONFIG | ONE | LARGE)).save_pretrained(path)
    return path


@pytest.fixture
def broken(monkeypatch):
    """Every model breaks its graph."""
    forward = FwPKMForCausalLM.forward

    def breaks(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FwPKMForCausalLM, "forward", breaks)


def test_environment(monkeypatch):
    monkeypatch.setenv("FWPKM_CHECK", "1")
    monkeypatch.delenv("FWPKM_IMPL", raising=False)
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    module = sys.modules["fwpkm.compile.environment"]  # the package has a function of that name
    monkeypatch.setattr(module, "PACKAGES", ("torch", "transformers", "no-such-package"))
    found = environment()
    assert found.versions["torch"] == version("torch")
    assert found.versions["transformers"] == version("transformers")
    assert found.versions["fwpkm"] == __version__
    assert found.versions["no-such-package"] is None
    assert found.compiler is None
    assert set(found.operators) == {name for name in fwpkm.ops.__all__ if hasattr(torch.ops.fwpkm, name)} > {"log_read"}
    for runs in found.operators.values():
        assert runs["cpu"] == "reference"
        assert ("cuda" in runs) == torch.cuda.is_available() == bool(found.gpus)
    assert found.variables == {"FWPKM_CHECK": "1"}
    assert json.loads(json.dumps(found.to_json()))["versions"] == found.versions
    with (console := Console(width=300)).capture() as shown:
        console.print(found.table())
    lines = shown.get().splitlines()
    for name, value in (("torch ", version("torch")), ("no-such-package", "not installed"), ("FWPKM_CHECK", "1")):
        assert any(name in line and value in line for line in lines)
    assert any("memory_write_" in line and "cpu: reference" in line for line in lines)


@pytest.mark.parametrize(
    ("said", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version:",
            "570.86.15",
        ),
        (None, None),
    ],
)
def test_driver_and_cpu(said, driver, tmp_path, monkeypatch):
    for module, name in (("fwpkm.machine", "CPU_FILE"), ("fwpkm.compile.environment", "DRIVER_FILE")):
        monkeypatch.setattr(sys.modules[module], name, tmp_path / name)
    if said:
        (tmp_path / "DRIVER_FILE").write_text(said)
        (tmp_path / "CPU_FILE").write_text(
            "processor\t: 0\nmodel name\t: A Fine CPU\nprocessor\t: 1\nmodel name\t: B\n"
        )
    found = environment()
    assert found.driver == driver
    assert found.lines()["GPU driver"] == (driver or "none")
    assert found.cpu.startswith("A Fine CPU, " if said else platform.processor() or platform.machine())


def test_collect_env(capsys):
    runpy.run_module("fwpkm.collect_env", run_name="__main__")
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("```text", "```")
    assert [re.split(" {2,}", line, maxsplit=1) for line in lines] == [[*x] for x in environment().lines().items()]


def test_an_implementation_that_cannot_run_is_said(monkeypatch):
    monkeypatch.setattr("fwpkm.ops._implementation.FORCED", "fast")
    assert "FWPKM_IMPL is 'fast'; expected 'reference' or 'triton'" in environment().operators["memory_read"]["cpu"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_delta_rule_of_a_gpu_is_another_packages(installed, monkeypatch):
    monkeypatch.setattr("fwpkm.ops.implementation", lambda kind: {"cpu": "reference", "cuda": "triton"}[kind])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="a GPU", major=9, minor=0))
    module = sys.modules["fwpkm.compile.environment"]
    monkeypatch.setattr(module, "_version", lambda package: "1" if installed else None)
    found = environment().operators
    assert found["memory_scan"] == {"cpu": "reference", "cuda": "triton"}
    rule = found["gated_delta_rule"]
    assert rule["cpu"] == "reference"
    assert rule["cuda"].startswith("flash-linear-attention")
    assert ("pip install 'fwpkm[fla]'" in rule["cuda"]) != installed


def test_doctor():
    result = run("doctor")
    assert "Environment" in result.stdout
    assert version("transformers") in result.stdout
    assert "Audit" not in result.stdout
    data = json.loads(run("doctor", "--json").stdout)
    assert data == {"environment": json.loads(json.dumps(environment().to_json())), "audit": None}


def test_doctor_audits_a_model(folder):
    data = json.loads(run("doctor", "--json", "--model", folder, "--length", 16, "--length", 24).stdout)["audit"]
    assert data["clean"]
    assert {graph["phase"] for graph in data["graphs"]} == {"inference"}
    assert [(x["name"], x["calls"]) for x in data["operators"] if "memory" in x["name"]] == [("fwpkm::memory_scan", 2)]
    assert {x["input"] for x in data["recompiles"]} <= {1}


def test_doctor_audits_training(folder):
    result = run("doctor", "--model", folder, "--length", 16, "--training")
    for text in ("forward", "backward", "fwpkm::memory_scan_backward", "Audit", "Environment"):
        assert text in result.stdout


def test_doctor_ends_with_1_if_a_graph_breaks(folder, broken):
    result = run("doctor", "--json", "--model", folder, "--length", 8, code=1)
    (found,) = json.loads(result.stdout)["audit"]["breaks"]
    assert "graph_break()" in found["reason"]
    assert found["where"].split(":")[0].endswith("tests/compile/test_doctor.py")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "checkpoint is nowhere; expected a folder with config.json"),
        (["--length", "0"], "length is 0; expected a positive integer"),
    ],
)
def test_doctor_says_what_is_wrong_in_one_line(options, message):
    result = run("doctor", *options, code=2)
    assert result.stderr.startswith("fwpkm: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
