"""``fwpkm eval``, as a user calls it: its figures are those of the functions, and it repeats a run from its file."""

import json
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from fwpkm.cli import app
from fwpkm.cli.evaluate.run import differences
from fwpkm.data import tokens as token_files
from fwpkm.data.codec import Codec
from fwpkm.data.questions import pairs, secret_numbers
from fwpkm.data.text import file_documents, help_topics, load_split, standard_library
from fwpkm.demo import Questions, documents
from fwpkm.evaluation.adaptation import adaptation
from fwpkm.evaluation.associative import associative_recall
from fwpkm.evaluation.gates import gates
from fwpkm.evaluation.memory import never_written
from fwpkm.evaluation.perplexity import by_position, perplexity, side_by_side, token_losses
from fwpkm.evaluation.readings import ask_after_readings
from fwpkm.evaluation.recall import ask
from tests.evaluation.tiny import model as tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=256, fwpkm_chunk_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A model without a training."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four short texts."""
    path = tmp_path_factory.mktemp("text")
    large = [file for file in standard_library() if file.stat().st_size > 4000]
    for i, file in enumerate(large[:80:20]):
        (path / f"{i}.py").write_bytes(file.read_bytes()[:900])
    return path


@pytest.fixture(scope="module")
def training(tmp_path_factory, model, files):
    """The folder of a training: tokens, and a checkpoint."""
    path = tmp_path_factory.mktemp("training")
    token_files.prepare(path / "data", lambda: file_documents(sorted(files.iterdir())), Codec(), {"text": "x"})
    model.save_pretrained(path / "checkpoints" / "step-00000007")
    return path


def run(*args, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def results(folder, name):
    read = json.loads((folder / f"{name}.json").read_text())
    picture = imread(folder / f"{name}.png")
    assert picture.shape[1] == 1440
    assert np.unique(picture.sum(-1)).size > 50
    assert read["evaluation"] == name
    assert read["version"]
    assert read["machine"]["torch"] == torch.__version__
    return read


def joined(files):
    return np.frombuffer(b"".join(path.read_bytes() + b"\n" for path in sorted(files.iterdir())), np.uint8)


def test_perplexity(training, model):
    result = run("perplexity", training, "--rows", 2, "--memory", "on", "--memory", "off")
    have, held_out = results(training, "perplexity"), token_files.load(training / "data").held_out
    assert have["checkpoint"] == str(training / "checkpoints" / "step-00000007")
    figures = have["figures"]
    assert figures["text"]["name"] == f"held out from {training}"
    assert figures["text"]["tokens"] == held_out.size
    for measured, net in zip(figures["runs"], (model, never_written(model)), strict=True):
        want = perplexity(net, held_out, rows=2)
        assert {name: measured[name] for name in want} == pytest.approx(want)
        bins = by_position(token_losses(net, side_by_side(held_out, 2)))
        assert [x["loss"] for x in measured["positions"]] == pytest.approx([x["loss"] for x in bins])
        assert f"{want['perplexity']:.3f}" in result.stdout
    assert [measured["memory"] for measured in figures["runs"]] == ["on", "off"]
    run(
        "perplexity", have["checkpoint"], "--rows", 2, "--memory", "on", "--memory", "off", "--out", training / "p.json"
    )
    assert json.loads((training / "p.json").read_text())["figures"] == figures


def test_perplexity_with_resets(folder, model, files):
    """Every so many tokens, or with every document; then all is read in one row."""
    text, sizes = joined(files), [path.stat().st_size + 1 for path in sorted(files.iterdir())]
    run("perplexity", folder, "--text", files, "--memory", "reset", "--reset-every", 100, "--tokens", 1000, "--rows", 3)
    have = results(folder, "perplexity")["figures"]["runs"][0]
    want = perplexity(model, text[:1000], 3, resets=range(0, 333, 100))
    assert {name: have[name] for name in want} == pytest.approx(want)
    run("perplexity", folder, "--text", files, "--memory", "reset", "--memory", "on", "--tokens", 2000)
    have = results(folder, "perplexity")["figures"]["runs"]
    starts = [sum(sizes[:i]) for i in range(1, len(sizes))]
    assert have[0]["loss"] == pytest.approx(perplexity(model, text[:2000], 1, resets=starts)["loss"])
    assert have[1]["loss"] == pytest.approx(perplexity(model, text[:2000], 1)["loss"])


def test_perplexity_of_a_model_with_a_tokenizer(tmp_path, tokenizer, files):
    net = tiny_model(vocab_size=300, fwpkm_chunk_size=64)
    net.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    run("perplexity", tmp_path, "--text", files / "0.py", "--text", files / "1.py", "--tokens", 300)
    read, bytes_per_token, _ = token_files.encode(file_documents([files / "0.py", files / "1.py"]), tokenizer)
    assert bytes_per_token == 1802 / read.size
    have = results(tmp_path, "perplexity")["figures"]["runs"][0]
    want = perplexity(net, read[:300], bytes_per_token=bytes_per_token)
    assert {name: have[name] for name in want} == pytest.approx(want)
    refused = run("needles", tmp_path, "--form", "demo", "--text", files, "--length", 800, code=2)
    assert "form is 'demo'; expected another for" in refused.stderr
    run("needles", tmp_path, "--form", "pairs", "--length", 300, "--texts", 1, "--facts", 2)
    haystack = pairs(np.random.default_rng((0, 300)), 300, 2)
    have = results(tmp_path, "needles")["figures"]["recall"]
    assert have[0]["tokens"] == tokenizer.encode(haystack.text).size
    run("recall", tmp_path, "--pairs", 3, "--sequences", 1)
    assert results(tmp_path, "recall")["figures"]["recall"][0]["chance"] == 1 / 150


@pytest.mark.parametrize("form", ["paper", "pairs"])
def test_needles(folder, model, files, form):
    options = ("--form", form, "--length", 400, "--length", 700, "--texts", 2, "--facts", 3, "--readings", 2)
    result = run("needles", folder, *options, "--text", files, "--seed", 4)
    rows = results(folder, "needles")["figures"]["recall"]
    assert [(row["length"], row["readings"], row["questions"]) for row in rows] == [
        (400, 1, 6),
        (400, 2, 6),
        (700, 1, 6),
        (700, 2, 6),
    ]
    filler = np.frombuffer(b"\n".join(path.read_bytes() for path in sorted(files.iterdir())), np.uint8)
    for i, size in enumerate((400, 700)):
        rng = np.random.default_rng((4, size))
        haystacks = [pairs(rng, size, 3) if form == "pairs" else secret_numbers(filler, rng, size, 3) for _ in range(2)]
        for have, want in zip(rows[2 * i :], ask_after_readings(model, haystacks, 2), strict=False):
            for name in ("exact", "tokens_right", "depths"):
                assert have[name] == want[name]
    assert "400" in result.stdout


def test_needles_as_in_the_demo(folder, model):
    result = run("needles", folder, "--form", "demo", "--length", 512, "--length", 1024, "--texts", 3, "--facts", 2)
    have = results(folder, "needles")
    rows = have["figures"]["recall"]
    assert [(row["length"], row["questions"]) for row in rows] == [(512, 6), (1024, 6)]
    _, filler = load_split(standard_library())
    want = ask(model, documents(filler, Questions(512, 3, 2), 0)).summary()
    for name in ("exact", "depths", "load"):
        assert rows[0][name] == want[name]
    assert rows[0]["tokens_right"] == want["digits"]
    assert "1K" in result.stdout


def test_defaults_of_a_form_are_written_down(folder, files, monkeypatch):
    monkeypatch.setattr("fwpkm.cli.evaluate.needles.FORMS", {"paper": ([300, 400], 2)})
    run("needles", folder, "--texts", 1, "--text", files)
    settings = results(folder, "needles")["settings"]
    assert settings == {
        "form": "paper",
        "length": [300, 400],
        "texts": 1,
        "facts": 2,
        "readings": 1,
        "text": str(files),
        "column": "text",
        "seed": 0,
    }


def test_recall(folder, model):
    result = run("recall", folder, "--pairs", 3, "--pairs", 5, "--sequences", 2, "--seed", 1)
    have = results(folder, "recall")["figures"]["recall"]
    assert have == [associative_recall(model, pairs, 2, 1) for pairs in (3, 5)]
    assert "0.8%" in result.stdout


def test_adaptation(folder, model, files):
    options = ("--length", 200, "--rows", 2, "--piece", 60)
    run("adaptation", folder, "--a", files, *options)
    have = results(folder, "adaptation")["figures"]
    a = joined(files)
    b = np.frombuffer(b"".join(read() + b"\n" for read in help_topics()), np.uint8)
    assert [text["tokens"] for text in have["texts"]] == [400, 400]
    for measured, net in zip(have["runs"], (model, never_written(model)), strict=True):
        want = adaptation(net, a, b, 200, 2, 60)
        for name in ("first", "again", "after"):
            assert measured[name] == pytest.approx(want[name])
        assert [x["loss"] for x in measured["curve"]] == pytest.approx([x["loss"] for x in want["curve"]])
    assert [measured["memory"] for measured in have["runs"]] == ["on", "off"]


def test_adaptation_without_a_memory(tmp_path, files):
    tiny_model(vocab_size=256, fwpkm_layers=[]).save_pretrained(tmp_path)
    run("adaptation", tmp_path, "--a", files, "--length", 100, "--rows", 1, "--piece", 50)
    assert [measured["memory"] for measured in results(tmp_path, "adaptation")["figures"]["runs"]] == ["on"]
    refused = run("gates", tmp_path, "--text", files, code=2)
    assert "expected a block with a memory" in refused.stderr


def test_gates(folder, model, files):
    run("gates", folder, "--text", files, "--text", "needles", "--text", "random", "--tokens", 1200, "--rows", 3)
    have = results(folder, "gates")["figures"]["texts"]
    assert [text["name"] for text in have] == [str(files), "needles", "random"]
    assert [text["tokens"] for text in have] == [1200] * 3
    _, filler = load_split(standard_library())
    random = np.random.default_rng(0).integers(0, 256, 1200)
    needles = np.frombuffer(secret_numbers(filler, np.random.default_rng(0), 1200, 2).text, np.uint8)
    for text, read in zip(have, (joined(files)[:1200], needles, random), strict=True):
        want = gates(model, torch.from_numpy(read.reshape(3, 400).astype("int64")))
        for layer, other in zip(text["layers"], want, strict=True):
            assert layer["mean"] == pytest.approx(other["mean"])
            assert layer["histogram"] == pytest.approx(other["histogram"])


def test_a_data_set_by_name(tmp_path, folder, model, monkeypatch):
    rows = [{"body": f"text {i} " * 40} for i in range(5)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"dataset:{tmp_path / 'set'}"
    run("perplexity", folder, "--text", name, "--column", "body", "--rows", 2)
    have = results(folder, "perplexity")["figures"]
    text = np.frombuffer("".join(row["body"] + "\n" for row in rows).encode(), np.uint8)
    assert have["text"]["tokens"] == text.size
    assert have["runs"][0]["loss"] == pytest.approx(perplexity(model, text, 2)["loss"])
    refused = run("gates", folder, "--text", name, code=2)
    assert "column is 'text'; expected one of ['body']" in refused.stderr
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused = run("perplexity", folder, "--text", name, code=2)
    assert refused.stderr == "fwpkm: a data set by name needs the package datasets: pip install 'fwpkm[data]'\n"


@pytest.fixture(params=["perplexity", "needles", "recall", "adaptation", "gates"])
def written(request, tmp_path, folder, files):
    """The file of a small run."""
    texts = ("--text", files)
    options = {
        "perplexity": (*texts, "--memory", "reset", "--reset-every", 99),
        "needles": (*texts, "--length", 300, "--texts", 2, "--facts", 2),
        "recall": ("--pairs", 4),
        "adaptation": ("--a", files, "--length", 100, "--rows", 2, "--piece", 50),
        "gates": (*texts, "--text", "random", "--tokens", 500),
    }
    file = tmp_path / "first.json"
    run(request.param, folder, *options[request.param], "--out", file)
    return file


def test_a_run_is_repeated_from_its_file(written, tmp_path):
    result = run("rerun", written, "--out", tmp_path / "again.json")
    assert "All figures are the same." in result.stdout
    first, again = (json.loads(path.read_text()) for path in (written, tmp_path / "again.json"))
    assert not list(differences(first["figures"], again["figures"]))
    for name in ("evaluation", "settings", "checkpoint", "fingerprint"):
        assert again[name] == first[name]


def test_a_figure_that_is_another_now_is_named(folder, files, tmp_path):
    file = tmp_path / "p.json"
    run("perplexity", folder, "--text", files, "--out", file)
    first = json.loads(file.read_text())
    first["figures"]["runs"][0]["loss"] += 1e-9
    first["figures"]["text"]["tokens"] += 1
    file.write_text(json.dumps(first))
    result = run("rerun", file, code=1)
    assert "figures.runs[0].loss: " in result.stdout
    assert "figures.text.tokens: " in result.stdout
    assert "2 figures differ." in result.stdout


def test_a_model_may_move_but_not_change(tmp_path, folder, files, model):
    file = tmp_path / "r.json"
    model.save_pretrained(tmp_path / "old")
    run("recall", tmp_path / "old", "--pairs", 2, "--out", file)
    (tmp_path / "old").rename(tmp_path / "new")
    assert "checkpoint is" in run("rerun", file, code=2).stderr
    assert "All figures are the same." in run("rerun", file, "--checkpoint", tmp_path / "new").stdout
    tiny_model(1, vocab_size=256).save_pretrained(tmp_path / "new")
    refused = run("rerun", file, "--checkpoint", tmp_path / "new", code=2)
    assert f"the fingerprint of {tmp_path / 'new'} is" in refused.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is without some of these; expected what an evaluation has written, with ['checkpoint'"),
        ('{"settings": {}}', "is without some of these"),
        (
            '{"evaluation": "taste", "checkpoint": "x", "fingerprint": "x", "settings": {}, "figures": {}}',
            "is 'taste'; expected one of perplexity, needles, recall, adaptation, gates",
        ),
    ],
)
def test_a_file_of_no_evaluation(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    refused = run("rerun", tmp_path / "x.json", code=2)
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_differences():
    before = {"a": [1, {"b": 2, "seconds": 3}], "c": None}
    assert not list(differences(before, {"a": [1, {"b": 2, "seconds": 4}], "c": None}))
    assert list(differences(before, {"a": [1, {"b": 5, "seconds": 4}], "c": 0})) == [
        "figures.a[1].b: 2 before, 5 now",
        "figures.c: None before, 0 now",
    ]
    assert list(differences([1], [1, 2])) == ["figures: [1] before, [1, 2] now"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity", "nowhere"], "checkpoint is nowhere; expected a folder with config.json"),
        (["perplexity", "MODEL", "--tokens", "1"], "tokens is 1; expected at least 2"),
        (["perplexity", "MODEL", "--rows", "0"], "rows is 0; expected a positive integer"),
        (["perplexity", "MODEL", "--tokens", "9", "--rows", "8"], "text is 9 tokens long; expected at least 16"),
        (["perplexity", "MODEL", "--text", "nowhere"], "nowhere does not exist; expected a text file or"),
        (["perplexity", "MODEL", "--memory", "maybe"], "memory is 'maybe'; expected 'on' or 'off' or 'reset'"),
        (["perplexity", "MODEL", "--reset-every", "-1"], "reset_every is -1; expected a positive integer, or 0"),
        (
            ["perplexity", "MODEL", "--memory", "reset"],
            "reset_every is 0; expected a positive integer: where",
        ),
        (["recall", "MODEL", "--out", "x.png"], "out is x.png; expected a file *.json, beside which a picture"),
        (["needles", "nowhere"], "checkpoint is nowhere; expected a folder with config.json"),
        (["needles", "MODEL", "--form", "x"], "form is 'x'; expected 'paper' or 'pairs' or 'demo'"),
        (["needles", "MODEL", "--texts", "0"], "texts is 0; expected a positive integer"),
        (["needles", "MODEL", "--facts", "0"], "facts is 0; expected a positive integer"),
        (["needles", "MODEL", "--readings", "0"], "readings is 0; expected a positive integer"),
        (["needles", "MODEL", "--length", "0"], "length is 0; expected a positive integer"),
        (["needles", "MODEL", "--length", "100"], "expected at least 410 bytes for 5 needles and their questions"),
        (
            ["needles", "MODEL", "--form", "pairs", "--length", "100"],
            "length is 100; expected at least 120 bytes",
        ),
        (["needles", "MODEL", "--form", "demo", "--readings", "2"], "readings is 2; expected 1 with form 'demo'"),
        (["needles", "MODEL", "--form", "demo", "--length", "100"], "length is 100; expected at least 574 bytes"),
        (["needles", "MODEL", "--seed", "-1"], "seed is -1; expected a number >= 0"),
        (["recall", "MODEL", "--pairs", "0"], "pairs is 0; expected a positive integer"),
        (["recall", "MODEL", "--pairs", "99999"], "pairs is 99999; expected in [1, 16384], the keys of 256 tokens"),
        (["recall", "MODEL", "--sequences", "0"], "sequences is 0; expected a positive integer"),
        (["adaptation", "MODEL", "--a", "nowhere"], "nowhere does not exist"),
        (["adaptation", "MODEL", "--a", "TEXT", "--rows", "9"], "tokens long; expected at least 147456, 9 times 16384"),
        (["adaptation", "MODEL", "--a", "TEXT", "--length", "2"], "length is 2; expected at least 3"),
        (["gates", "MODEL", "--tokens", "0"], "tokens is 0; expected a positive integer"),
        (["gates", "MODEL", "--text", "TEXT", "--rows", "5000"], "tokens long; expected at least 10000 tokens"),
        (["gates", "MODEL", "--text", "nowhere"], "nowhere does not exist"),
    ],
)
def test_eval_says_what_is_wrong_in_one_line(training, files, arguments, message):
    names = {"MODEL": training, "TEXT": files}
    result = run(*[names.get(argument, argument) for argument in arguments], code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
