"""The benchmark runs, refuses what is wrong, and its tables are those of the committed results."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import check, cpu, decode, gpu, peak, plain, released, subjects, tables, timing, work
from benchmarks.cases import MARGIN, Case, safe_inputs
from tests.draws import Draw, seeds

ROOT = Path(__file__).parents[1]
TINY = dataclasses.replace(
    cpu.QUICK,
    paper=Case(tokens=48, n_subkeys=12, key_dim=8, value_dim=8, topk=4, chunk=16),
    grid=Case(tokens=32, n_subkeys=12, key_dim=8, value_dim=8, topk=4, chunk=16),
    grids=((16, 32), (8, 16), (1, 2), (2, 4), (4, 8)),
    repeats=2,
    decode_tokens=2,
    copy_megabytes=1,
)


@pytest.fixture
def no_children(monkeypatch):
    """Peak memory is measured in processes that take seconds to start."""
    monkeypatch.setattr(peak, "peak_bytes", lambda name, case, backward: case.tokens * 1000)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "cpu.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(peak, "peak_bytes", lambda name, case, backward: case.tokens * 1000)
        cpu.run(TINY, cpu.SECTIONS, out)
    return json.loads(out.read_text())


def test_every_table_is_made_of_a_run(results):
    text = tables.everything(results)
    assert text.count("| --") >= len(tables.TABLES)
    for name in ("fast_weight_memory", "plain PyTorch", "layers.FwPKM", "GB/s", "GFLOP/s", "one hot slot", "commit"):
        assert name in text


def test_tables_stand_between_their_marks(results):
    text = "before\n<!-- cpu.json: paper -->\nold\n<!-- end of paper -->\nafter\n"
    once = tables.filled(text, results)
    assert tables.paper(results["paper"]) in once
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("<!-- end of paper -->\nafter\n")
    assert tables.filled(once, results) == once


@pytest.mark.parametrize("page", tables.PAGES)
def test_pages_have_the_tables_of_the_committed_results(page):
    text = (ROOT / page).read_text()
    assert "<!-- cpu.json: " in text
    assert tables.filled(text, json.loads(cpu.RESULTS.read_text())) == text


def test_committed_results_are_whole():
    committed = json.loads(cpu.RESULTS.read_text())
    assert set(committed) == set(cpu.SECTIONS)
    assert committed["paper"]["result"]["case"] == dataclasses.asdict(cpu.PAPER)


def test_other_sections_stay(tmp_path, no_children):
    out = tmp_path / "cpu.json"
    out.write_text('{"grids": 1}')
    cpu.run(TINY, ("paper",), out)
    found = json.loads(out.read_text())
    assert found["grids"] == 1
    rows = {(row["name"], row["backward"]): row for row in found["paper"]["result"]["rows"]}
    assert {name for name, _ in rows} >= {"fwpkm", "layer", "plain"}
    for row in rows.values():
        assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]


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
@pytest.mark.parametrize("section", ["paper", "grids", "parts"])
def test_what_is_wrong_is_not_timed(wrong, section, tmp_path, monkeypatch, no_children):
    def never(*_, **__):
        raise AssertionError("timed before it was compared")

    monkeypatch.setattr(timing, "interleaved", never)
    with pytest.raises(check.WrongResultError, match="fwpkm"):
        cpu.run(TINY, (section,), tmp_path / "cpu.json", subjects.MEMORIES | {"fwpkm": wrong})
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


def test_summary_is_median_and_quartiles():
    assert timing.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"seconds": 3.0, "quartiles": [2.0, 4.0], "repeats": 5}
    assert timing.summary([2.0])["quartiles"] == [2.0, 2.0]


def test_work_of_the_papers_size():
    parts = {part.name: part for part in work.parts(Case())}
    assert parts["scoring products"].flops == 2 * 2048 * 512 * 512
    assert parts["gather and sum"].bytes == 2048 * (8 + 1) * 512 * 4
    assert parts["commit"].flops == 2 * 1536 * 8 * 512  # the last chunk's commit is read by nobody
    assert work.total(Case(key_update="slow"), True)[1] < work.total(Case(), True)[1]


@pytest.mark.skipif(not peak.STATUS.exists(), reason="needs Linux")
def test_peak_counts_copies_of_the_values_and_not_the_values():
    case = Case(tokens=64, n_subkeys=256, key_dim=8, value_dim=64, topk=2, chunk=32)  # values of 16.8 MB
    values = case.n_slots * case.value_dim * 4
    assert peak.peak_bytes("fwpkm", case, False) < values / 2
    assert values <= peak.peak_bytes("plain", case, False) < 2 * values


def test_unknown_sections_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--only is speed; expected one of paper"):
        cpu.main(only=["speed"], out=tmp_path / "cpu.json")
    with pytest.raises(ValueError, match="--quick"):
        cpu.main(only=[], quick=True)


STUB = """
import torch
from benchmarks import plain
from benchmarks.cases import Case, Inputs
from .xformer_embeddingbag_grad_wrapper import xformers_embedding_bag

class FastWeightProductKeyMemory(torch.nn.Module):
    def __init__(self, mem_k_dim, mem_v_dim, mem_heads, mem_topk, mem_n_subkeys):
        super().__init__()
        self.keys = torch.nn.Parameter(torch.zeros(2 * mem_heads * mem_n_subkeys, mem_k_dim // 2))
        self.values = torch.nn.Parameter(torch.zeros(mem_n_subkeys**2, mem_v_dim))
        self.sizes = dict(n_subkeys=mem_n_subkeys, topk=mem_topk, key_dim=mem_k_dim, value_dim=mem_v_dim)

    def forward(self, q, ref_v, gates, chunk_size):
        case = Case(tokens=q.shape[1], chunk=chunk_size, **self.sizes)
        keys = self.keys.detach().view(1, 2, case.n_subkeys, -1)
        x = Inputs(q.unsqueeze(2), ref_v, gates, keys, self.values.detach())
        slots = torch.arange(4).view(2, 2)
        bag = xformers_embedding_bag(indices=slots, weight=self.values, per_sample_weights=torch.ones(2, 2))
        assert torch.equal(bag[1], self.values[2] + self.values[3])
        return {"output": plain.fast_weight_memory(x, case) * SCALE}
"""


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_released_code_is_found_by_its_variable_and_compared(scale, tmp_path, monkeypatch):
    """A module of the released one's interface, in its place in a checkout, right and wrong."""
    module = tmp_path / "src" / "models" / "fwpkm" / "fwpkm.py"
    module.parent.mkdir(parents=True)
    module.write_text(STUB.replace("SCALE", str(scale)))
    monkeypatch.setenv(released.VARIABLE, str(tmp_path))
    for name in [name for name in sys.modules if name.startswith(released._PACKAGE)]:
        monkeypatch.delitem(sys.modules, name)
    inputs, _ = safe_inputs(TINY.paper)
    try:
        if scale == 1:
            assert max(check.check_released(TINY.paper, inputs).values()) < check.TOLERANCE
            subjects.released_run(inputs, TINY.paper)(True)
        else:
            with pytest.raises(check.WrongResultError, match="released: output is off"):
                check.check_released(TINY.paper, inputs)
    finally:
        for name in [name for name in sys.modules if name.startswith(released._PACKAGE)]:
            del sys.modules[name]


def test_a_folder_without_the_released_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(released.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=r"FWPKM_RELEASED_CODE is .*; expected a checkout of the released code"):
        released.folder()
    monkeypatch.delenv(released.VARIABLE)
    assert released.folder() is None


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
