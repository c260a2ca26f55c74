"""``fwpkm train`` and ``generate``, as a user calls them."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fwpkm.cli import app, console
from fwpkm.data import tokens as token_files
from fwpkm.data.codec import Codec
from fwpkm.data.text import dataset_documents, file_documents, load_split, standard_library
from fwpkm.models import FwPKMForCausalLM, presets
from fwpkm.training import checkpoint
from tests.children import CONFIG, command, finish, records, start
from tests.tokenizer import save_tokenizer

TEXT = "def größe(x):\n    return x  # 日本語 🎉\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of five files."""
    folder = tmp_path_factory.mktemp("text")
    large = [path for path in standard_library() if path.stat().st_size > 4000]
    for i, path in enumerate(large[:100:20]):
        (folder / f"{i}.py").write_bytes(path.read_bytes()[:4000])
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, text):
    """The folder of a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, [path.read_text() for path in text.iterdir()])
    return folder


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


SMALL = ("--steps", 2, "--batch", 2, "--length", 24, "--evaluate-tokens", 200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text, config):
    out = tmp_path_factory.mktemp("trained") / "out"
    result = run("train", out, "--text", text, "--config", config, *SMALL)
    return out, result


def test_train(trained, text):
    out, result = trained
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "data", "metrics.jsonl", "training.png"]
    last = records(out)[-1]
    assert f"Trained 2 steps. Held-out text: perplexity {last['held_out_perplexity']:.2f} a token" in result.stdout
    assert str(checkpoint.latest(out / "checkpoints")) in "".join(result.stdout.split("\n"))
    tokens = token_files.load(out / "data")
    train, held_out = load_split(list(text.iterdir()))
    assert bytes(tokens.train) == bytes(train) + b"\n"
    assert bytes(tokens.held_out) == bytes(held_out) + b"\n"
    assert tokens.bytes_per_token == 1
    assert tokens.source == {"text": [str(text)], "tokenizer": None}


def test_train_again_goes_on_with_the_tokens_that_were_made(trained, config, text, tmp_path):
    out, _ = trained
    before = records(out)
    assert "Trained 2 steps" in run("train", out, "--text", text, "--config", config, *SMALL).stdout
    assert records(out) == before
    refused = run("train", out, "--text", tmp_path, "--config", config, *SMALL, code=2)
    assert refused.stderr.startswith(f"fwpkm: text is {{'text': ['{tmp_path}'], 'tokenizer': None}}; expected what")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_train(tmp_path, text, name):
    options = ("--steps", 1, "--batch", 1, "--length", 64, "--evaluate-tokens", 64)
    run("train", tmp_path / "out", "--text", text, "--preset", name, *options)
    saved = FwPKMForCausalLM.from_pretrained(checkpoint.find(tmp_path / "out"))
    assert saved.config.hidden_size == presets.PRESETS[name]["hidden_size"]
    assert saved.config.vocab_size == 256


def test_train_with_a_tokenizer(tmp_path, text, config, tokenizer):
    out = tmp_path / "out"
    run(
        "train",
        out,
        "--text",
        text / "0.py",
        "--text",
        text / "1.py",
        "--tokenizer",
        tokenizer,
        "--config",
        config,
        *SMALL,
    )
    codec, tokens = Codec.of_checkpoint(checkpoint.find(out)), token_files.load(out / "data")
    assert codec.vocab_size == 300
    assert tokens.train.dtype == np.uint16
    contents = {path.read_text() for path in (text / "0.py", text / "1.py")}
    assert {codec.tokenizer.decode(part) for part in (tokens.train, tokens.held_out)} == {c + "<end>" for c in contents}
    held_out = codec.tokenizer.decode(tokens.held_out).removesuffix("<end>")
    assert tokens.bytes_per_token == pytest.approx((len(held_out.encode()) + 1) / tokens.held_out.size)
    model = FwPKMForCausalLM.from_pretrained(checkpoint.find(out))
    assert (model.config.vocab_size, model.config.eos_token_id) == (300, 0)
    figures = records(out)[-1]
    assert figures["held_out_nats_per_byte"] == pytest.approx(figures["held_out_loss"] / tokens.bytes_per_token)

    refused = run(
        "train", tmp_path / "b", "--text", text, "--tokenizer", tokenizer, "--config", bytes_only(tmp_path), code=2
    )
    assert "vocab_size is 256; expected at least the 300 tokens of the text" in refused.stderr


def bytes_only(folder):
    path = folder / "bytes.json"
    path.write_text(json.dumps(CONFIG | {"vocab_size": 256}))
    return path


def test_train_from_a_model(tmp_path, trained, text, tokenizer, config):
    """Its weights, its configuration, its tokenizer; the second training is one of its own."""
    out, _ = trained
    run("train", tmp_path / "more", "--text", text, "--from", out, *SMALL, "--learning-rate", "1e-12")
    first, second = (FwPKMForCausalLM.from_pretrained(checkpoint.find(x)) for x in (out, tmp_path / "more"))
    for name, tensor in first.state_dict().items():
        assert torch.allclose(second.state_dict()[name], tensor, atol=1e-9)
    assert [record["step"] for record in records(tmp_path / "more")] == [1, 2, 2]
    run("train", tmp_path / "t", "--text", text, "--tokenizer", tokenizer, "--config", config, *SMALL)
    run("train", tmp_path / "u", "--text", text, "--from", tmp_path / "t", *SMALL)
    assert Codec.of_checkpoint(checkpoint.find(tmp_path / "u")).vocab_size == 300
    assert token_files.load(tmp_path / "u" / "data").train.dtype == np.uint16


def test_a_saved_configuration_describes_a_model(tmp_path, trained, text):
    saved = checkpoint.find(trained[0]) / "config.json"
    run("train", tmp_path / "out", "--text", text, "--config", saved, *SMALL)
    assert records(tmp_path / "out") == records(trained[0])


def test_train_on_a_data_set(tmp_path, config):
    rows = [{"text": f"text {i} " * 40, "other": "x"} for i in range(20)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    run("train", out, "--dataset", tmp_path / "set", "--config", config, *SMALL)
    tokens = token_files.load(out / "data")
    lines = [bytes(part).decode().removesuffix("\n").split("\n") for part in (tokens.train, tokens.held_out)]
    assert (len(lines[0]), len(lines[1])) == (18, 2)
    assert sorted(lines[0] + lines[1]) == sorted(row["text"] for row in rows)
    assert tokens.source == {"dataset": str(tmp_path / "set"), "column": "text", "tokenizer": None}
    with pytest.raises(ValueError, match=r"column is 'body'; expected one of \['text', 'other'\]"):
        dataset_documents(str(tmp_path / "set"), "body")
    with pytest.raises(ValueError, match=r"dataset is '.*nowhere'; expected one that loads"):
        dataset_documents(str(tmp_path / "nowhere"))


def test_a_data_set_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused = run("train", tmp_path / "out", "--dataset", "wikitext", code=2)
    assert refused.stderr == "fwpkm: a data set by name needs the package datasets: pip install 'fwpkm[data]'\n"


def test_a_stopped_training_says_how_to_go_on(tmp_path, text, config):
    """Ctrl-C: exit code 130, and the same command goes on to the end."""
    out = tmp_path / "out"
    arguments = ["train", out, "--text", text, "--config", config, "--steps", 2000, "--batch", 1, "--length", 16]
    arguments = [str(x) for x in (*arguments, "--evaluate-tokens", 20, "--evaluate-every", 2000)]
    child = start(interrupted, str(tmp_path / "output"), *arguments)
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        child.join(0.05)
        assert child.is_alive()
    os.kill(child.pid, signal.SIGINT)
    assert finish(child) == 130
    step = checkpoint.read(checkpoint.find(out)).step
    assert len(records(out)) == step
    output = " ".join((tmp_path / "output").read_text().split())
    assert f"Stopped after step {step:,} of 2,000; the same command goes on from there." in output


def interrupted(output: str, *arguments: str) -> None:
    with open(output, "w") as file:
        console.console.file = file
        command(*arguments)


def greedy(model, tokens, count):
    """Argmax, without a cache."""
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), 1)
    return tokens


@pytest.mark.parametrize("piece", [4096, 7])
def test_generate(trained, tmp_path, monkeypatch, piece):
    """The likeliest bytes, from a prompt or a file; however the prompt is cut."""
    monkeypatch.setattr("fwpkm.models.modeling._PIECE", piece)
    out, _ = trained
    model = FwPKMForCausalLM.from_pretrained(checkpoint.find(out)).eval()
    prompt = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        want = bytes(greedy(model, prompt, 12)[0].tolist()).decode(errors="replace") + "\n"
    assert run("generate", out, "--prompt", TEXT, "--tokens", 12, "--temperature", 0).stdout == want
    (tmp_path / "prompt").write_text(TEXT)
    assert run("generate", out, "--file", tmp_path / "prompt", "--tokens", 12, "--temperature", 0).stdout == want


def test_generate_draws_by_seed_temperature_and_share(trained):
    out, _ = trained

    def drawn(*options):
        return run("generate", out, "--prompt", "def", "--tokens", 30, *options).stdout

    assert drawn() == drawn("--seed", 0)
    assert drawn() != drawn("--seed", 1)
    assert drawn("--top-p", 1e-6) == drawn("--temperature", 0) == drawn("--temperature", 1e-7)
    assert drawn("--temperature", 0) != drawn()


def test_a_byte_of_any_value_can_be_drawn(tmp_path, trained):
    """Not the likeliest fifty only, which is what transformers draws from unless told."""
    out, _ = trained
    model = FwPKMForCausalLM.from_pretrained(checkpoint.find(out))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    text = run("generate", tmp_path, "--prompt", "x", "--tokens", 300).stdout
    assert len({character for character in text if ord(character) < 128}) > 50


def test_generate_with_a_tokenizer(tmp_path, text, config, tokenizer):
    out = tmp_path / "out"
    run("train", out, "--text", text, "--tokenizer", tokenizer, "--config", config, *SMALL)
    codec, model = Codec.load(tokenizer), FwPKMForCausalLM.from_pretrained(checkpoint.find(out)).eval()
    prompt = torch.tensor([codec.encode(TEXT.encode()).tolist()])
    with torch.no_grad():
        tokens = greedy(model, prompt, 12)[0]
    want = codec.tokenizer.decode(tokens).split("<end>")[0]
    have = run("generate", out, "--prompt", TEXT, "--tokens", 12, "--temperature", 0).stdout
    assert have.split("<end>")[0].rstrip() == want.rstrip()


@pytest.mark.parametrize("kind", ["bytes", "tokens"])
def test_text_comes_as_soon_as_it_is_certain(tokenizer, kind):
    codec = Codec() if kind == "bytes" else Codec.load(tokenizer)
    for text in (TEXT, "é", "🎉🎉", "  a  b\n\n c", ""):
        decoder = codec.decoder()
        pieces = [decoder.decode(int(token)) for token in codec.encode(text.encode())]
        assert "".join(pieces) == text
        assert decoder.finish() == ""
    decoder = codec.decoder()
    cut = codec.encode("ab🎉".encode())[:-1]
    assert "".join(decoder.decode(int(token)) for token in cut) == "ab"
    assert set(decoder.finish()) == {"\N{REPLACEMENT CHARACTER}"}


def test_tokens_are_prepared_once(tmp_path, text):
    source = {"text": "x"}
    token_files.prepare(tmp_path, lambda: file_documents(sorted(text.iterdir())), Codec(), source)
    first = bytes(token_files.load(tmp_path).train)
    token_files.prepare(tmp_path, lambda: pytest.fail("asked for again"), Codec(), source)
    assert bytes(token_files.load(tmp_path).train) == first
    path = tmp_path / "train.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path} is damaged .*; delete {tmp_path} to make it anew"):
        token_files.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere"], "nowhere does not exist; expected a text file or a folder of text files"),
        (["--text", "x", "--dataset", "y"], "text is given as --text and as --dataset; expected one of them"),
        (["--preset", "huge"], "preset is 'huge'; expected 'tiny' or 'small'"),
        (["--preset", "tiny", "--config", "x"], "model is --preset and --config; expected one of them"),
        (["--config", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--from", "nowhere"], "checkpoint is nowhere; expected a folder with config.json, or that of a training"),
        (["--tokenizer", "./nowhere"], "tokenizer is './nowhere'; expected one that loads"),
        (["--steps", "0"], "steps is 0; expected a positive integer"),
        (["--batch", "3", "--accumulate", "2"], "batch is 3; expected a multiple of 2, processes (1) times"),
        (["--precision", "fp8"], "precision is 'fp8'; expected 'no' or 'bf16'"),
        (["--fsdp"], "fsdp is True; expected several processes, from torchrun or accelerate launch"),
        (["--length", "100000"], "tokens long; expected at least the 100000 of a sequence"),
    ],
)
def test_train_says_what_is_wrong_in_one_line(tmp_path, text, options, message):
    given = options if {"--text", "--dataset"} & set(options) else [*options, "--text", text]
    result = run("train", tmp_path / "out", *given, code=2)
    assert result.stderr.startswith("fwpkm: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON: "),
        ("[1]", "is list; expected an object with fields of FwPKMConfig"),
        ('{"hiden_size": 3, "hidden_size": 4}', "is hiden_size; expected fields of FwPKMConfig"),
        ('{"fwpkm_topk": []}', "topk is []; expected an integer >= 1"),
        ('{"fwpkm_topk": 0}', "topk is 0; expected an integer >= 1"),
        ('{"fwpkm_topk": [], "hidden_size": "large"}', "hidden_size is 'large'; expected an integer >= 1"),
    ],
)
def test_a_configuration_that_describes_no_model(tmp_path, text, content, message):
    (tmp_path / "c.json").write_text(content)
    result = run("train", tmp_path / "out", "--text", text, "--config", tmp_path / "c.json", code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL"], "prompt is missing; expected one of --prompt and --file"),
        (["generate", "MODEL", "--prompt", "a", "--file", "b"], "prompt is given as --prompt and --file; expected one"),
        (["generate", "MODEL", "--prompt", ""], "prompt is empty; expected at least one token"),
        (["generate", "MODEL", "--file", "nowhere"], "nowhere: No such file or directory"),
        (["generate", "MODEL", "--prompt", "a", "--tokens", "0"], "tokens is 0; expected a positive integer"),
        (["generate", "MODEL", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0; expected a number >= 0"),
        (["generate", "MODEL", "--prompt", "a", "--top-p", "0"], "top_p is 0.0; expected a share in (0, 1]"),
        (["generate", "nowhere", "--prompt", "a"], "checkpoint is nowhere; expected a folder with config.json"),
    ],
)
def test_generate_says_what_is_wrong_in_one_line(trained, arguments, message):
    result = run(*[trained[0] if argument == "MODEL" else argument for argument in arguments], code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
