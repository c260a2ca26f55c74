"""The side-by-side benchmark runs, refuses what is wrong, leaves out what does not fit, and says so in its tables.

The released code and the published package have stand-ins here, of their interfaces; the package itself where it is
installed.
"""

import dataclasses
import json
import sys
import types

import pytest
import torch

from benchmarks import check, package, peak, peers, plain, plots, reads, released, states, subjects, tables, timing
from benchmarks.cases import Case, draw, safe_inputs
from benchmarks.subjects import MEMORIES
from fwpkm.report.theme import LIGHT

TINY = dataclasses.replace(
    peers.QUICK,
    paper=Case(tokens=48, n_subkeys=12, key_dim=8, value_dim=8, topk=4, chunk=16),
    grid=Case(tokens=32, n_subkeys=12, key_dim=8, value_dim=8, topk=4, chunk=16),
    grids=((16, 32), (8, 16), (1, 2)),
    reads=(Case(tokens=3, n_subkeys=8, value_dim=4), Case(tokens=20, n_subkeys=4, value_dim=8)),
    repeats=2,
    copy_megabytes=1,
)

RELEASED = """
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
        assert q.shape[0] == 1  # its memory is one for all rows
        case = Case(tokens=q.shape[1], chunk=chunk_size, **self.sizes)
        keys = self.keys.detach().view(1, 2, case.n_subkeys, -1)
        x = Inputs(q.unsqueeze(2), ref_v, gates, keys, self.values.detach())
        slots = torch.arange(4).view(2, 2)
        bag = xformers_embedding_bag(indices=slots, weight=self.values, per_sample_weights=torch.ones(2, 2))
        assert torch.equal(bag[1], self.values[2] + self.values[3])
        return {"output": plain.fast_weight_memory(x, case) * SCALE}
"""


class _Published(torch.nn.Module):
    """The package's interface: projections, memories and keys as parameters, ``retrieve`` within ``forward``."""

    scale = 1.0

    def __init__(self, dim, *, num_memories, dim_queries_keys, dim_values, **options):
        super().__init__()
        n = round(num_memories**0.5)
        self.memories = torch.nn.Parameter(torch.zeros(num_memories, 1, dim_values))
        self.keys = torch.nn.Parameter(torch.zeros(2, 1, n, dim_queries_keys))
        self.to_queries = self.to_gates = self.to_values = self.to_out = torch.nn.Identity()
        sizes = {"n_subkeys": n, "key_dim": 2 * dim_queries_keys, "value_dim": dim_values}
        self.case = Case(**sizes, topk=options["topk"], chunk=options["chunk_size"])
        assert options["learning_rate"] * options["addressing_loss_weight"] == pytest.approx(1)
        assert options["learning_rate"] == pytest.approx(self.case.topk * self.case.chunk / (self.case.chunk - 1))
        assert not options["use_boundary_embed"]
        assert options["mse_loss_weight_to_keys"] == 0

    def retrieve(self, tokens):
        query = torch.cat(tuple(self.to_queries(tokens)), -1)
        target, gate = self.to_values(tokens).squeeze(2), self.to_gates(tokens)[..., 0, 0]
        assert (gate[:, self.case.chunk - 1 :: self.case.chunk] == 0).all()
        case = dataclasses.replace(self.case, tokens=tokens.shape[1])
        x = plain_inputs(query, target, gate, self.keys.transpose(0, 1), self.memories[:, 0])
        read = plain.fast_weight_memory(x, case) * self.scale
        return self.to_out(target.lerp(read, gate.unsqueeze(-1))), {"values": read.unsqueeze(2)}

    def forward(self, tokens, return_next_memories=False):
        out, _ = self.retrieve(tokens)
        state = torch.zeros(tokens.shape[0], 10), 3, None
        return (out, state) if return_next_memories else out


def plain_inputs(*tensors):
    return types.SimpleNamespace(**dict(zip(("query", "target", "gate", "keys", "values"), tensors, strict=True)))


@pytest.fixture
def released_code(tmp_path, monkeypatch):
    """Puts a module of its interface where the released code would be, with outputs times a number."""

    def forget():
        for name in [name for name in sys.modules if name.startswith(released._PACKAGE)]:
            del sys.modules[name]

    def install(scale=1.0):
        module = tmp_path / "checkout" / "src" / "models" / "fwpkm" / "fwpkm.py"
        module.parent.mkdir(parents=True)
        module.write_text(RELEASED.replace("SCALE", str(scale)))
        monkeypatch.setenv(released.VARIABLE, str(tmp_path / "checkout"))
        forget()

    yield install
    forget()


@pytest.fixture
def published_package(monkeypatch):
    """The same for the package."""

    def install(scale=1.0):
        module = types.ModuleType(package.MODULE)
        module.fwPKM = type("fwPKM", (_Published,), {"scale": scale})
        monkeypatch.setitem(sys.modules, package.MODULE, module)
        monkeypatch.setattr(package.metadata, "version", lambda name: "1.2.3")

    return install


@pytest.fixture
def no_children(monkeypatch):
    """Peak memory is measured in processes that take seconds to start."""
    monkeypatch.setattr(peak, "peak_bytes", lambda name, case, backward, limit: case.tokens * 1000)


def test_every_table_and_the_picture_are_made_of_a_run(tmp_path, no_children, released_code, published_package):
    """All four and the layer, at tiny sizes."""
    released_code()
    published_package()
    out = tmp_path / "peers.json"
    out.write_text('{"other": 1}')
    peers.run(TINY, peers.SECTIONS, out)
    results = json.loads(out.read_text())
    assert results.pop("other") == 1
    assert results.keys() == set(peers.SECTIONS)
    for section in results.values():
        assert {"machine", "date", "version", "command", "load_before"} <= section["where"].keys()

    rows = {(row["name"], row["backward"]): row for row in results["paper"]["result"]["rows"]}
    assert rows.keys() == {(name, kind) for name in (*MEMORIES, "layer") for kind in (False, True)}
    for (_, kind), row in rows.items():
        assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        assert row["over_ours"] == pytest.approx(row["seconds"] / rows["fwpkm", kind]["seconds"])
    errors = results["paper"]["result"]["errors"]
    assert errors.keys() == {*MEMORIES, "layer"}
    assert max(max(found.values()) for found in errors.values()) < check.TOLERANCE
    for grid, sizes in zip(peers.GRIDS, TINY.grids, strict=True):
        found = results[grid]["result"]["rows"]
        assert {(row["name"], row["size"]) for row in found} == {(name, size) for name in MEMORIES for size in sizes}
        assert len(results[grid]["result"]["growth"]) == 2 * len(MEMORIES)

    text = tables.everything("peers", results)
    names = ("`fast_weight_memory`", "plain PyTorch", "released code", f"{package.NAME} 1.2.3", "`embedding_bag`")
    for name in (*names, "layers.FwPKM", "GB/s", "T = 16", "N = 64", "B = 2", "State: package", "Exponent of time"):
        assert name in text
    assert "Left out" not in text
    assert "Not installed" not in text
    plots.growth_curves(results, tmp_path / "peers.png")
    figure = plots.draw(results, LIGHT)
    assert [len(panel.lines) for panel in figure.axes] == [len(MEMORIES)] * 9


def test_who_is_not_installed_is_left_out_and_named(tmp_path, no_children, monkeypatch):
    monkeypatch.delenv(released.VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, package.MODULE, None)
    out = tmp_path / "peers.json"
    peers.run(TINY, ("paper", "batch"), out)
    results = json.loads(out.read_text())
    assert {row["name"] for row in results["paper"]["result"]["rows"]} == {"layer", "fwpkm", "plain"}
    for name in ("paper", "times", "memory"):
        made = tables.TABLES[f"peers/{name}"](results)
        assert "Not installed in this run: the released code, the package. " in made


def test_what_does_not_fit_or_takes_too_long_is_left_out_and_named(tmp_path, monkeypatch):
    def peak_bytes(name, case, backward, limit):
        if name == "plain" and backward and case.tokens == 32:
            raise peak.DoesNotFitError
        return 1

    def in_turn(runs, repeats):
        return {name: [30.0 if name == "plain forward" else 1.0] for name in runs}

    monkeypatch.setattr(peak, "peak_bytes", peak_bytes)
    monkeypatch.setattr(timing, "in_turn", in_turn)
    memories = {name: MEMORIES[name] for name in ("fwpkm", "plain")}
    found = peers.grid(TINY, "tokens", (16, 32, 48), memories)
    rows = {(row["name"], row["backward"], row["size"]): row for row in found["rows"]}
    left = {key: row["left_out"] for key, row in rows.items() if "left_out" in row}
    slow = "more than 5 s at a smaller size"
    assert left == {("plain", False, 32): slow, ("plain", True, 32): "more than 12 GB", ("plain", False, 48): slow}
    assert set(found["errors"]["32"]) == {"fwpkm"}
    where = {"machine": {"cpu": "x", "threads": 1, "torch": "2"}, "date": "today", "command": "c", "load_before": 0.0}
    text = tables.TABLES["peers/times"]({"tokens": {"where": where, "result": found}})
    assert f"plain, forward at T = 32, T = 48: {slow}; plain, forward + backward at T = 32: more than 12 GB" in text
    assert "| T = 32 | 1.00 s | – |" in text


def _wrong(inputs, case):
    return lambda inputs, case: subjects.ours(inputs, case) * 1.01


@pytest.mark.parametrize("name", ["fwpkm", "plain"])
@pytest.mark.parametrize("section", ["paper", "tokens"])
def test_what_is_wrong_is_not_timed(name, section, tmp_path, monkeypatch, no_children):
    def never(*_, **__):
        raise AssertionError("timed before it was compared")

    monkeypatch.setattr(timing, "in_turn", never)
    memories = {who: MEMORIES[who] for who in ("fwpkm", "plain")} | {name: _wrong}
    with pytest.raises(check.WrongResultError, match=f"{name}: output is off"):
        peers.run(TINY, (section,), tmp_path / "peers.json", memories)
    assert not (tmp_path / "peers.json").exists()


def test_wrong_reads_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(reads.READS, "embedding_bag", lambda *x: reads.bag(*x) * 1.001)
    with pytest.raises(check.WrongResultError, match="embedding_bag: output is off"):
        peers.run(TINY, ("reads",), tmp_path / "peers.json")


@pytest.mark.parametrize("scale", [1.0, 1.01])
@pytest.mark.parametrize("name", ["released", "package"])
def test_others_are_found_and_compared(name, scale, released_code, published_package):
    """Of several sequences, right and wrong."""
    {"released": released_code, "package": published_package}[name](scale)
    assert name in subjects.installed()
    case = dataclasses.replace(TINY.paper, batch=2)
    inputs, _ = safe_inputs(case)
    if scale == 1:
        found = check.check_memories(case, inputs, {name: MEMORIES[name]})[name]
        assert len(found) == 4
        assert max(found.values()) < check.TOLERANCE
    else:
        with pytest.raises(check.WrongResultError, match=f"{name}: output is off"):
            check.check_memories(case, inputs, {name: MEMORIES[name]})


def test_the_package_itself_computes_the_same():
    """Outputs and all gradients, over several chunks and sequences; and as it comes it does not."""
    published = pytest.importorskip(package.MODULE)
    case = Case(tokens=50, n_subkeys=12, batch=2, topk=3, key_dim=8, value_dim=6, chunk=16)
    inputs, _ = safe_inputs(case)
    found = check.check_memories(case, inputs, {"package": MEMORIES["package"]})
    assert len(found["package"]) == 4
    options = {"mse_loss_weight_to_keys": 1.0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        right = published.fwPKM.__init__
        monkeypatch.setattr(published.fwPKM, "__init__", lambda self, dim, **x: right(self, dim, **x | options))
        with pytest.raises(check.WrongResultError, match="package"):
            check.check_memories(case, inputs, {"package": MEMORIES["package"]})


def test_states_are_what_sequences_keep():
    """Ours grows with the tokens, not with the slots, up to values of its own; the others have those from the start.

    Where the log was folded within the last tokens that can be taken back, values from before are kept beside them.
    """
    case = Case(tokens=64, n_subkeys=32, key_dim=8, value_dim=8, topk=2, chunk=16, batch=2)

    def size(name, **changes):
        other = dataclasses.replace(case, **changes)
        return states.state_bytes(name, draw(other), other)

    keys, values = 2 * 32 * 4 * 4, 32**2 * 8 * 4
    assert size("plain") == keys + values
    record = 2 * 8 + 2 * 4 + 8 * 4  # slots, coefficients, residual
    assert keys + 64 * record <= size("fwpkm") <= keys + 3 * 64 * record
    slower = size("fwpkm", key_update="slow")
    assert size("fwpkm", n_subkeys=64, key_update="slow") == slower
    assert 1.8 < size("fwpkm", tokens=128, key_update="slow") / slower < 2.2
    for tokens in (4096, 4400, 8192):
        assert size("fwpkm", tokens=tokens, key_update="slow") < 4 * values


def test_released_states_are_its_parameters(released_code):
    released_code()
    case = TINY.paper
    assert states.state_bytes("released", draw(case), case) == states.state_bytes("plain", draw(case), case)


def test_a_folder_without_the_released_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(released.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=r"FWPKM_RELEASED_CODE is .*; expected a checkout of the released code"):
        released.folder()
    monkeypatch.delenv(released.VARIABLE)
    assert released.folder() is None


@pytest.mark.parametrize(("changes", "named"), [({"heads": 2}, "heads is 2"), ({"key_update": "slow"}, "key_update")])
def test_cases_that_the_package_has_not_are_refused(changes, named, published_package):
    published_package()
    case = dataclasses.replace(TINY.paper, **changes)
    with pytest.raises(ValueError, match=named):
        package.Package(draw(case), case)


@pytest.mark.skipif(not peak.STATUS.exists(), reason="needs Linux")
def test_peak_counts_copies_of_the_values_and_not_the_values():
    case = Case(tokens=64, n_subkeys=256, key_dim=8, value_dim=64, topk=2, chunk=32)  # values of 16.8 MB
    values = case.n_slots * case.value_dim * 4
    assert peak.peak_bytes("fwpkm", case, False, peers.QUICK.memory) < values / 2
    assert values <= peak.peak_bytes("plain", case, False, peers.QUICK.memory) < 2 * values
    large = dataclasses.replace(case, n_subkeys=4096)  # of 4.3 GB
    with pytest.raises(peak.DoesNotFitError, match="memory_read needs more than 2 GB"):
        peak.peak_bytes("memory_read", large, False, 2 * 10**9)


def test_unknown_sections_are_refused():
    with pytest.raises(ValueError, match="--only is speed; expected one of paper"):
        peers.main(only=["speed"])
    with pytest.raises(ValueError, match="--quick"):
        peers.main(only=[], quick=True)
