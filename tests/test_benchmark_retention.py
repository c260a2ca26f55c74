"""The parts of benchmarks/retention.py: its documents, decay and gate bias, and the whole at a tiny size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from benchmarks import retention, retention_tables
from fwpkm.baselines.comparison import file_name
from fwpkm.baselines.models import baselines
from fwpkm.data.needles import SENTENCE_BYTES, document
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from tests.draws import Draw, seeds
from tests.test_demo import TINY

SETTINGS = dataclasses.replace(TINY, training_chunk=16, chunk=32, query_conv=3)
MODELS = {baseline.name: baseline for baseline in baselines(SETTINGS)}
CODE = np.frombuffer(b"def f(x):\n    return x + 1\n" * 400, np.uint8)
HELP = np.frombuffer(b"It says what a statement does.\n" * 400, np.uint8)


def model(name: str) -> FwPKMForCausalLM:
    return MODELS[name].for_sequences(MODELS[name].build(SETTINGS), SETTINGS).eval()


@given(seeds, st.integers(1, 4), st.integers(0, 9))
def test_documents_ask_for_both_domains(seed, facts, other_facts):
    rng = np.random.default_rng(seed)
    first = document(CODE, rng, 700, facts)
    made = retention.after(first, rng, HELP, other_facts, 2000)
    assert made.tokens.size == 2000
    text = bytes(made.tokens).decode()
    assert len(made.answers) == len(made.names) == facts + min(facts, other_facts)
    body = first.tokens.size - facts * SENTENCE_BYTES
    for i, (name, start, answer) in enumerate(zip(made.names, made.needles, made.answers, strict=True)):
        number = bytes(made.tokens[answer]).decode()
        sentence = f"The secret number for ID-{name} is {number}.\n"
        assert text[start : start + SENTENCE_BYTES] == sentence
        assert text.count(sentence) == 2
        assert (start < body) == (i < facts)
        assert min(answer) > 2000 - len(made.names) * SENTENCE_BYTES


@pytest.mark.parametrize("name", retention.CHANGED)
def test_decay_is_its_formula(name):
    """What is left of a write: a half-life is what it says, in rows that nothing wrote to since; keys stay."""
    made, half_life, chunks = model(name), 3, 6
    tokens = Draw(0).integers(256, 2, 32 * chunks)
    base = made.memories()[0].values
    cache, plain_cache = FwPKMCache(made.config), FwPKMCache(made.config)
    want = base.repeat(2, 1)
    with retention.decaying(made, half_life), torch.no_grad():
        for i in range(chunks):
            made(tokens[:, 32 * i : 32 * (i + 1)], past_key_values=cache)
            # the same chunk, from the values that this loop keeps
            if i:
                state = plain_cache.memories[0]
                memory = dataclasses.replace(state.memory, own_values=want.clone(), log=None, committed=0)
                plain_cache.memories[0] = state._replace(memory=memory)
            hooks, made._forward_hooks = made._forward_hooks, type(made._forward_hooks)()
            made(tokens[:, 32 * i : 32 * (i + 1)], past_key_values=plain_cache)
            made._forward_hooks = hooks
            before, want = want, plain_cache.memories[0].memory.dense_values()
            for row in range(len(want)):
                if torch.equal(want[row], before[row]):
                    start = base[row % len(base)]
                    want[row] = start + (want[row] - start) * 0.5 ** (1 / half_life)
            have = cache.memories[0].memory
            assert have.own_values is not None
            assert_close(have.own_values, want)
            assert_close(have.keys, plain_cache.memories[0].memory.keys)
    assert not made._forward_hooks


def test_decay_refuses_other_calls():
    made = model("FwPKM slow exact")
    with (
        retention.decaying(made, 3),
        torch.no_grad(),
        pytest.raises(ValueError, match="call is no chunk; expected calls of one chunk each"),
    ):
        made(torch.zeros(1, 33, dtype=torch.int64), past_key_values=FwPKMCache(made.config))


def test_gate_bias_is_added_before_the_sigmoid():
    made = model("FwPKM slow exact")
    tokens = Draw(0).integers(256, 1, 20)
    with torch.no_grad():
        plain = made(tokens, output_memories=True).gates[0]
        with retention.biased(made, -2.0):
            lower = made(tokens, output_memories=True).gates[0]
        assert_close(lower.logit(), plain.logit() - 2)
        assert_close(made(tokens, output_memories=True).gates[0], plain)


def test_retention(tmp_path, monkeypatch):
    """From models on disk to the file of results; models without a memory are not there."""
    monkeypatch.setattr(retention, "SETTINGS", SETTINGS)
    monkeypatch.setattr(retention, "FACTS", 2)
    monkeypatch.setattr(retention, "FIRST", 512)
    monkeypatch.setattr(retention, "LENGTH", 1024)
    monkeypatch.setattr(retention, "OTHER_FACTS", 3)
    losses = {"first": 3.0, "again": 2.0, "after": 2.25, "kept": 0.75}
    monkeypatch.setattr(retention, "adaptation", lambda model, a, b, rows: losses)
    models = tmp_path / "models"
    for name in ("FwPKM slow exact", "FwPKM fast paper"):
        model(name).save_pretrained(models / file_name(MODELS[name]))
    monkeypatch.setattr("sys.argv", ["retention", "--models", str(models), "--out", str(tmp_path / "r.json")])
    retention.main()
    results = json.loads((tmp_path / "r.json").read_text())
    rows = results["rows"]
    names = [(row["name"], row["addition"]) for row in rows]
    assert names[:2] == [("FwPKM fast paper", ""), ("FwPKM slow exact", "")]
    assert names[2:] == [("FwPKM slow exact", addition) for addition in retention.ADDITIONS]
    for row in rows:
        assert row["recall"]["nothing"]["learned"] is row["recall"]["help without facts"]["learned"] is None
        assert row["recall"]["help"]["kept"]["questions"] == row["recall"]["help"]["learned"]["questions"] == 4
    lines = [line for line in retention_tables.recall(results).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert retention_tables.adaptation(results).count("| 3.000 | 2.000 | 2.250 | 75% |") == 2
    losses["again"] = 2.999
    assert retention_tables.adaptation({"rows": [{"name": "x", "adaptation": losses}]}).endswith("| 2.250 | – |\n")

    rows[0]["kept"] = True
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows[:1]}))
    again = retention.run(models, tmp_path / "r.json")
    assert again[0] == rows[0]
    assert again[1]["recall"] == rows[1]["recall"]
