"""The benchmark of compiled models runs, refuses what is wrong, and its tables are those of the committed results.

Nothing is compiled, which takes a while: what graphs are made of these models is tested in tests/compile.
"""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import compile as benchmark
from benchmarks import overhead, tables, timing
from benchmarks.check import WrongResultError

pytestmark = pytest.mark.unpoisoned
TINY = dataclasses.replace(
    benchmark.QUICK, repeats=2, lengths=(32, 64), contexts=(32, 64), piece=32, decode_tokens=4, overhead_repeats=2
)


class _Like(torch.nn.Module):
    """A model, and what happens to its results."""

    def __init__(self, model, change=lambda output: None):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, **inputs):
        output = self.model(**inputs)
        self.change(output)
        return output


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """And a first step has no process of its own."""
    monkeypatch.setattr(benchmark, "compile_model", lambda model, dynamic: _Like(model))
    monkeypatch.setattr(benchmark, "first_step", lambda size, kind, cache: {"first": 2.0, "second": 1.0})


def test_every_table_is_made_of_a_run(tmp_path):
    out = tmp_path / "compile.json"
    out.write_text('{"other": 1}')
    benchmark.run(TINY, benchmark.SECTIONS, out)
    results = json.loads(out.read_text())
    assert results.pop("other") == 1
    assert results.keys() == set(benchmark.SECTIONS)

    rows = results["step"]["result"]["rows"]
    assert [(row["key_update"], row["compiled"]) for row in rows] == [
        (kind, graph) for kind in (None, "slow", "fast") for graph in (True, False)
    ]
    for row in rows:
        base = next(x for x in rows if x["key_update"] is None and x["compiled"] == row["compiled"])
        assert row["over_without"] == pytest.approx(row["seconds"] / base["seconds"])
        eager = next(x for x in rows if x["key_update"] == row["key_update"] and not x["compiled"])
        assert row["over_eager"] == pytest.approx(row["seconds"] / eager["seconds"])
    assert max(x["error"] for x in results["step"]["result"]["errors"].values()) < 1e-4

    everything, addresses, nothing = results["checkpoint"]["result"]
    assert everything["bytes"] > addresses["bytes"] >= nothing["bytes"]
    short, long = results["calls"]["result"]
    for name in ("memory_scan", "memory_scan_backward"):
        assert short["operators"][f"fwpkm::{name}"] == 1
    assert short["operators"] == long["operators"]
    assert 100 < short["aten"] == pytest.approx(long["aten"], abs=5)  # and no call more a chunk or token
    assert long["aten_inside"] > 0
    assert 0 < sum(short["shares"].values()) < 1
    assert [row["context"] for row in results["decode"]["result"]] == [32, 64]
    assert {row["name"] for row in results["overhead"]["result"]} == overhead.calls().keys()
    assert all(math.isfinite(row["overhead_alone"]) for row in results["overhead"]["result"])

    text = tables.everything("compile", results)
    for name in ("| Compiled |", "keys `fast`", "cold", "T = 64", "Over the first", "`memory_write_`", "µs"):
        assert name in text
    assert text.count("\n| --") == sum(name.startswith("compile/") for name in tables.TABLES)


def test_calls_are_counted_where_they_are_made():
    """Those of the run itself, and those within our operators; nothing that an ATen call makes of others."""
    values, slots, weights = torch.randn(8, 4), torch.zeros(3, 2, dtype=torch.int64), torch.randn(3, 2)

    def run():
        read = torch.ops.fwpkm.memory_read(values, slots, weights)
        torch.nn.functional.linear(read, values)  # a product, in which ATen transposes
        torch.relu(read)

    found = benchmark.counted(run)
    assert found["operators"] == {"fwpkm::memory_read": 1}
    assert found["aten"] == 2
    assert found["aten_inside"] > 0
    assert 0 < found["shares"]["fwpkm::memory_read"] < 1


def _other_loss(output):
    output.loss = output.loss + 0.01


def _other_gradients(output):
    output.loss = 1.01 * output.loss - 0.01 * output.loss.detach()


def _other_slots(output):
    output.slots = tuple(x + 1 for x in output.slots or ())


@pytest.mark.parametrize(
    ("change", "message"),
    [(_other_loss, "loss is off"), (_other_gradients, "gradients are off"), (_other_slots, "reads are of other slots")],
)
@pytest.mark.parametrize("section", ["step", "calls"])
def test_wrong_steps_are_not_timed(section, change, message, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("timed before it was compared")

    monkeypatch.setattr(timing, "interleaved", never)
    monkeypatch.setattr(benchmark, "counted", never)
    monkeypatch.setattr(benchmark, "compile_model", lambda model, dynamic: _Like(model, change))
    with pytest.raises(WrongResultError, match=message):
        benchmark.run(TINY, (section,), tmp_path / "compile.json")
    assert not (tmp_path / "compile.json").exists()


def test_wrong_decoding_is_not_timed(tmp_path, monkeypatch):
    """A memory that forgets what was stored in the pieces before."""
    right = benchmark.FwPKMForCausalLM.forward

    def forgetful(self, **inputs):
        output = right(self, **inputs)
        if inputs.get("cache") is not None:
            inputs["cache"].memories.clear()
        return output

    monkeypatch.setattr(benchmark.FwPKMForCausalLM, "forward", forgetful)
    with pytest.raises(WrongResultError, match="decode at 32: logits is off"):
        benchmark.run(TINY, ("decode",), tmp_path / "compile.json")


def test_another_implementation_is_refused(monkeypatch):
    right = overhead.implementation
    monkeypatch.setattr(overhead, "implementation", lambda name: lambda *args: right(name)(*args) * 1.001)
    with pytest.raises(WrongResultError, match="memory_read"):
        overhead.direct("memory_read", overhead.calls()["memory_read"])


def test_unknown_sections_are_refused():
    with pytest.raises(ValueError, match="--only is speed; expected one of step"):
        benchmark.main(only=["speed"])
    with pytest.raises(ValueError, match="--quick"):
        benchmark.main(only=[], quick=True)
