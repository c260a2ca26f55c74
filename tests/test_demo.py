"""The demo from end to end at a tiny size, its parts, and the command."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from fwpkm import cli, demo
from fwpkm.data.needles import SENTENCE_BYTES
from fwpkm.data.text import load_split
from fwpkm.evaluation.perplexity import perplexity
from fwpkm.evaluation.recall import ask, lower_bound
from fwpkm.models import FwPKMForCausalLM
from fwpkm.training.needles import NeedleTraining, train

TINY = demo.DemoSettings(
    training=NeedleTraining(steps=2, batch=2, length=256, needles=2),
    questions=(demo.Questions(512, 3, 2), demo.Questions(1024, 2, 4)),
    overwritten=demo.Questions(512, 2, 2),
    perplexity_bytes=2048,
    examples=2,
    width=32,
    n_subkeys=8,
)


def run(out, text, settings=TINY):
    seen = Counter()
    results = demo.run(out, settings, text, "fwpkm demo", lambda what, done, total: seen.update([what.split(":")[0]]))
    return results, seen


def test_demo(tmp_path, text):
    out = tmp_path / "demo"
    results, seen = run(out, text)
    assert seen["training memory"] == seen["training control"] == 2
    names = {"checkpoint", "control", "index.html", "recall-curve.png", "recall.png", "results.json", "training.png"}
    assert {p.name for p in out.iterdir()} == names
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = {(row["model"], row["length"]): row for row in results["recall"]}
    assert sorted(rows) == [("control", 512), ("control", 1024), ("memory", 512), ("memory", 1024)]
    assert rows["memory", 512]["questions"] == 6
    for row in rows.values():
        assert 0 <= row["exact_lower95"] <= row["exact"] <= row["digits"] <= 1
        assert sum(bin["questions"] for bin in row["depths"]) == row["questions"]
    assert rows["control", 512]["load"] is None
    load = rows["memory", 512]["load"]
    assert load["writes_per_slot"] == 512 * 8 / 64
    assert 0 < load["open_gate_writes_per_slot"] < load["writes_per_slot"]
    assert 0 < load["slots_touched"] <= 1
    assert [row["memory"] for row in results["perplexity"]] == ["on", "off", "none"]
    assert results["parameters"]["memory"] > results["parameters"]["control"]
    for example in results["examples"]:
        assert len(example["gates"]) == len(example["before"] + example["needle"] + example["after"])
        assert example["needle"] == f"{example['question']} {example['expected']}.\n"


def test_an_interrupted_demo_goes_on_where_it_stopped(tmp_path, text):
    """Interrupted while asking, it neither trains again nor asks again what it had asked; the figures are the same."""
    whole, _ = run(tmp_path / "whole", text)

    class Interrupt(Exception):
        pass

    def stop(what, done, total):
        if what.startswith("asking at 1,024"):
            raise Interrupt

    with pytest.raises(Interrupt):
        demo.run(tmp_path / "demo", TINY, text, "fwpkm demo", stop)
    results, seen = run(tmp_path / "demo", text)
    assert "training memory" not in seen
    assert "asking at 512 bytes" not in seen
    assert seen["asking at 1,024 bytes"] > 0
    for have, want in zip(results["recall"], whole["recall"], strict=True):
        assert {k: have[k] for k in ("model", "exact", "digits", "depths", "load")} == {
            k: want[k] for k in ("model", "exact", "digits", "depths", "load")
        }


def test_results_of_other_settings_are_not_overwritten(tmp_path, text):
    run(tmp_path, text)
    other = dataclasses.replace(TINY, chunk=128)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"out is .*; expected a new folder: this one holds the results of other"):
        run(tmp_path, text, other)
    assert (tmp_path / "results.json").read_bytes() == before


def test_both_models_train_on_the_same_documents(text):
    """The control sees what the model with memory sees, in the same order."""
    _, held_out = load_split(list(text.iterdir()))
    seen = []
    for memory in (True, False):
        model = demo.new_model(TINY, memory)
        documents = []
        model.register_forward_pre_hook(lambda m, a, k, d=documents: d.append(a[0].clone()), with_kwargs=True)
        list(train(model, held_out, TINY.training))
        seen.append(torch.stack(documents))
    assert torch.equal(*seen)


def test_training_learns_and_replays(text):
    train_text, _ = load_split(list(text.iterdir()))
    settings = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, steps=40))
    records = [list(train(demo.new_model(settings, True), train_text, settings.training)) for _ in range(2)]
    losses = [[record["loss"] for record in history] for history in records]
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-5:]) < 0.8 * losses[0][0]


class Oracle(torch.nn.Module):
    """A model that gives back what it was told, at chosen positions wrongly."""

    def __init__(self, model: FwPKMForCausalLM, documents, wrong: set[tuple[int, int]]) -> None:
        super().__init__()
        self.config, self.documents, self.wrong = model.config, documents, wrong
        self.device, self.read = torch.device("cpu"), 0

    def forward(self, tokens, cache, output_memories):
        start, self.read = self.read, self.read + tokens.shape[1]
        logits = torch.zeros(*tokens.shape, 256)
        for row, document in enumerate(self.documents):
            for t in range(tokens.shape[1]):
                right = int(document.tokens[(start + t + 1) % document.tokens.size])
                logits[row, t, right ^ 1 if (row, start + t + 1) in self.wrong else right] = 1
        return type("Result", (), {"logits": logits, "gates": None, "slots": None})()


def test_recall_counts_digits_and_numbers(text):
    """Two wrong digits of one number and one of another, whatever the size of a call."""
    _, held_out = load_split(list(text.iterdir()))
    documents = demo.documents(held_out, demo.Questions(700, 2, 3), seed=0)
    first, second = documents[0].answers[1], documents[1].answers[2]
    wrong = {(0, int(first[0])), (0, int(first[5])), (1, int(second[3]))}
    model = demo.new_model(TINY, memory=False)
    for call in (64, 1400):
        recall = ask(Oracle(model, documents, wrong), documents, call)
        assert recall.right.sum() == 2 * 3 * 6 - 3
        summary = recall.summary()
        assert summary["exact"] == pytest.approx(4 / 6)
        assert summary["digits"] == pytest.approx(33 / 36)
        assert summary["load"] is None


def test_stale_answers_are_counted(text):
    _, held_out = load_split(list(text.iterdir()))
    documents = demo.documents(held_out, demo.Questions(700, 1, 3), seed=0, overwritten=2)
    recall = ask(Oracle(demo.new_model(TINY, False), documents, set()), documents)
    assert recall.stale_share() == 0
    answers = recall.answers.copy()
    q = next(q for q, number in enumerate(documents[0].stale) if number)
    answers[0, q] = np.frombuffer(documents[0].stale[q].encode(), np.uint8)
    assert dataclasses.replace(recall, answers=answers).stale_share() == pytest.approx(1 / 3)


def test_perplexity_is_that_of_one_pass(text):
    model = demo.for_sequences(demo.new_model(TINY, True), 64).eval()
    piece = load_split(list(text.iterdir()))[1][:600]
    have = perplexity(model, piece, rows=2, call=77)
    tokens = torch.from_numpy(piece.copy()).view(2, 300).long()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(torch.tensor(have["loss"]), loss, rtol=1e-4, atol=1e-4)
    assert have["perplexity"] == pytest.approx(math.exp(have["loss"]))
    assert have["bytes"] == 600


def test_lower_bound():
    assert lower_bound(0, 10) == 0
    assert lower_bound(95, 100) == pytest.approx(0.8882, abs=1e-4)  # Wilson, from a table
    assert lower_bound(1000, 1000) == pytest.approx(0.9962, abs=1e-4)


def test_command(tmp_path, text, monkeypatch):
    monkeypatch.setattr(cli.demo, "DEFAULT", TINY)
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "out"), "--text", str(text), "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", "does not exist; expected a text file or a folder"),
        (lambda path: path, "text is empty; expected text in the 0 documents given"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(tmp_path, make, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "out"), "--text", str(make(folder))])
    assert result.exit_code == 2
    assert result.stderr.startswith("fwpkm: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_text_too_short_for_the_documents_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr(cli.demo, "DEFAULT", dataclasses.replace(TINY, training=NeedleTraining(steps=1, length=10**6)))
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "out"), "--text", str(text)])
    assert result.exit_code == 2
    assert "expected more than" in result.stderr
    assert len("The secret number for ID-a1b2 is 123456.\n") == SENTENCE_BYTES
