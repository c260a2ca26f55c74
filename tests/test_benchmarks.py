"""The benchmark of the CPU path runs, refuses what is wrong, and its parts do what they say."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import check, cpu, decode, gpu, plain, subjects, tables, timing, work
from benchmarks.cases import MARGIN, Case, safe_inputs
from tests.draws import Draw, seeds

TINY = dataclasses.replace(
    cpu.QUICK,
    paper=Case(tokens=48, n_subkeys=12, key_dim=8, value_dim=8, topk=4, chunk=16),
    grid=Case(tokens=32, n_subkeys=12, key_dim=8, value_dim=8, topk=4, chunk=16),
    grids=((2, 4), (4, 8)),
    repeats=2,
    decode_tokens=2,
    copy_megabytes=1,
)


def test_every_table_is_made_of_a_run(tmp_path):
    out = tmp_path / "cpu.json"
    cpu.run(TINY, cpu.SECTIONS, out)
    text = tables.everything("cpu", json.loads(out.read_text()))
    assert text.count("\n| --") == sum(name.startswith("cpu/") for name in tables.TABLES)
    for name in ("k = 2", "Dv = 8", "one hot slot", "Second", "commit", "Most of it"):
        assert name in text


def test_committed_results_are_whole():
    committed = json.loads(cpu.RESULTS.read_text())
    assert set(committed) == set(cpu.SECTIONS)
    assert committed["grids"]["result"]["case"] == dataclasses.asdict(cpu.GRID)


def test_other_sections_stay(tmp_path):
    out = tmp_path / "cpu.json"
    out.write_text('{"decode": 1}')
    cpu.run(TINY, ("grids",), out)
    found = json.loads(out.read_text())
    assert found["decode"] == 1
    assert [row["size"] for row in found["grids"]["result"]["topk"]["rows"]] == [2, 4, 2, 4]


def _without_counts(inputs, case):
    """Wrong from the second chunk on: the writes of a slot are not averaged."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "bincount", lambda x, minlength: torch.ones(minlength, dtype=torch.int64))
        return plain.fast_weight_memory(inputs, case)


def _without_gradient_of_gates(inputs, case):
    return subjects.ours(dataclasses.replace(inputs, gate=inputs.gate.detach()), case)


def _nan(inputs, case):
    return subjects.ours(inputs, case) * torch.nan


@pytest.mark.parametrize("wrong", [_without_counts, _without_gradient_of_gates, _nan])
@pytest.mark.parametrize("section", ["grids", "parts"])
def test_what_is_wrong_is_not_timed(wrong, section, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("timed before it was compared")

    monkeypatch.setattr(timing, "interleaved", never)
    with pytest.raises(check.WrongResultError, match="fwpkm"):
        cpu.run(TINY, (section,), tmp_path / "cpu.json", lambda inputs, case: wrong)
    assert not (tmp_path / "cpu.json").exists()


@pytest.mark.parametrize("section", ["decode", "prefill"])
def test_wrong_states_are_not_timed(section, tmp_path, monkeypatch):
    right = decode.fwpkm.fast_weight_memory

    def forgetful(query, target, gate, memory, config):
        result = right(query, target, gate, memory, config)
        return result._replace(output=result.output * 1.01)

    monkeypatch.setattr(decode.fwpkm, "fast_weight_memory", forgetful)
    with pytest.raises(check.WrongResultError):
        cpu.run(TINY, (section,), tmp_path / "cpu.json")
    assert not (tmp_path / "cpu.json").exists()


def test_wrong_layers_are_refused():
    case = TINY.paper
    module, hidden = subjects.layer(case), subjects.layer_hidden(case)
    check.check_layer(case, module, hidden)
    formula = [
        subjects.layer_formula(module, hidden, case, memory)
        for memory in (check.reference_memory, plain.fast_weight_memory)
    ]
    torch.testing.assert_close(*formula)
    module.output.forward = lambda x: x @ module.output.weight.T  # no bias
    with pytest.raises(check.WrongResultError, match="layer"):
        check.check_layer(case, module, hidden)


@given(seeds, st.sampled_from([4, 12, 40]), st.integers(1, 2))
def test_inputs_have_no_near_ties(seed, n, heads):
    case = Case(tokens=70, n_subkeys=n, key_dim=8, value_dim=4, topk=3, heads=heads, chunk=32)
    inputs, redrawn = safe_inputs(case, seed)
    assert redrawn >= 0
    keys = inputs.keys.double()
    for start in range(0, case.tokens, case.chunk):
        query = inputs.query[0, start : start + case.chunk].double()
        best = plain.sub_scores(query, keys).flatten(0, -2).sort(descending=True).values
        if n > 3:
            assert (best[:, 2] - best[:, 3]).min() >= MARGIN
        keys = plain.key_commit(query, keys, plain.address(query, keys, 3).sub_slots)


@given(seeds, st.floats(-1, 2))
def test_growth_is_the_exponent(seed, exponent):
    sizes = [2.0**i for i in range(4, 10)]
    noise = Draw(seed).uniform(len(sizes)).mul(0.02).add(0.99).tolist()
    costs = [3 * size**exponent * x for size, x in zip(sizes, noise, strict=True)]
    assert timing.growth(sizes, costs) == pytest.approx(exponent, abs=0.02)


def test_repeats_are_interleaved():
    called = []
    seconds = timing.interleaved({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert called == list("ab" * 4)  # the first round warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_slow_runs_are_repeated_less_and_among_the_others(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run(name, seconds):
        called.append(name)
        now[0] += seconds

    took = {"a": 0.5, "b": 1.0, "c": 5.0}
    seconds = timing.in_turn({name: lambda name=name: run(name, took[name]) for name in took}, 9)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 9, "b": 3, "c": 2}
    assert {name: set(values) for name, values in seconds.items()} == {name: {x} for name, x in took.items()}
    assert "".join(called) == "abc" + "aaa" + "ab" + "ac" + "a" + "ab" + "aa"  # the first round warms up


def test_summary_is_median_and_quartiles():
    assert timing.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"seconds": 3.0, "quartiles": [2.0, 4.0], "repeats": 5}
    assert timing.summary([2.0])["quartiles"] == [2.0, 2.0]


def test_work_of_the_papers_size():
    parts = {part.name: part for part in work.parts(Case())}
    assert parts["scoring products"].flops == 2 * 2048 * 512 * 512
    assert parts["gather and sum"].bytes == 2048 * (8 + 1) * 512 * 4
    assert parts["commit"].flops == 2 * 1536 * 8 * 512  # the last chunk's commit is read by nobody
    assert work.total(Case(key_update="slow"), True)[1] < work.total(Case(), True)[1]


def test_unknown_sections_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--only is speed; expected one of grids"):
        cpu.main(only=["speed"], out=tmp_path / "cpu.json")
    with pytest.raises(ValueError, match="--quick"):
        cpu.main(only=[], quick=True)


def test_the_gpu_benchmark_runs_here_at_a_tiny_size():
    """Operators and the whole memory, with what they are compared with; on the CPU, where figures mean nothing."""
    settings = dataclasses.replace(gpu.QUICK, batches=(2,))
    results = gpu.run(settings, torch.device("cpu"))
    names = {row["name"] for row in results["rows"]}
    half = ("address, bfloat16 query", "read, bfloat16 weights")
    for operator in ("address", "top-k", "read", "key commit", "scan", *half):
        assert {operator, f"{operator}, backward"} <= names
    assert {"write", "write, index_add_", "fast_weight_memory, forward + backward", "plain PyTorch, forward"} <= names
    assert all(row["seconds"] > 0 for row in results["rows"])
    assert gpu.table(results).row_count == len(names)


def test_what_is_wrong_is_not_timed_on_a_gpu(monkeypatch):
    right = gpu.ops.memory_read
    monkeypatch.setattr(gpu.ops, "memory_read", lambda *x: right(*x) * (1.001 if x[0].dtype == torch.float32 else 1))
    with pytest.raises(check.WrongResultError, match=r"read is off by 0\.001"):
        gpu.run(gpu.QUICK, torch.device("cpu"))
