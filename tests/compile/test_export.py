"""InferenceStep inference steps: the same numbers as the model, from tensors and operators alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

import fwpkm.compile
from fwpkm.cli import app
from fwpkm.compile import InferenceStep, load
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from tests.draws import Draw
from tests.test_models import make_model

# Calls of one token, of whole chunks (of 8), over a boundary, over several, and of more tokens than a step reads.
PIECES = [1, 3, 5, 1, 9, 8, 2, 6, 1, 1, 25, 2]
LAYOUTS = {
    "slow": {
        "fwpkm_key_update": "slow",
        "fwpkm_scope": "shared",
        "fwpkm_layers": [1],
        "pkm_layers": [0],
        "fwpkm_lookahead": 0,
    },
    "train_only": {"fwpkm_key_update": "train_only", "fwpkm_heads": 2, "fwpkm_detach_every": 2, "fwpkm_lookahead": 2},
    "fast": {"fwpkm_key_update": "fast", "fwpkm_layers": [0], "fwpkm_query_conv": 0, "fwpkm_log_dtype": "bfloat16"},
}
ONE_BLOCK = {
    "num_hidden_layers": 1,
    "layer_types": ["sliding_attention"],
    "fwpkm_layers": [0],
    "fwpkm_key_update": "slow",
}
CAPACITY = 70


def export(model: FwPKMForCausalLM, path, **options) -> None:
    fwpkm.compile.export(model, path, **{"batch": 2, "capacity": CAPACITY, "compiled": False} | options)


@torch.no_grad()
def of_model(model: FwPKMForCausalLM, tokens: Tensor) -> Tensor:
    cache = FwPKMCache(model.config)
    return torch.cat([model(x, past_key_values=cache).logits for x in tokens.split(PIECES, 1)], 1)


def of_step(step: InferenceStep, tokens: Tensor) -> Tensor:
    state, logits = step.start(), []
    for piece in tokens.split(PIECES, 1):
        found, state = step(piece, state)
        logits.append(found)
    return torch.cat(logits, 1)


in_one_layout = pytest.mark.parametrize("exported", ["fast"], indirect=True)


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request, tmp_path_factory):
    """A model, where its programs are, and these at work."""
    model = make_model(**LAYOUTS[request.param])
    path = tmp_path_factory.mktemp("exported") / "step"
    export(model, path)
    return model, path, load(path, compiled=False)


def test_a_program_streams_what_the_model_does(exported):
    model, _, step = exported
    tokens = Draw(1).integers(32, 2, sum(PIECES))
    assert_close(of_step(step, tokens), of_model(model, tokens), rtol=1e-4, atol=1e-4)


def test_a_state_is_continued_without_being_written_to(exported):
    step, tokens = exported[2], Draw(2).integers(32, 2, 30)
    _, state = step(tokens[:, :13], step.start())
    before = {name: x.clone() for name, x in state.items()}
    first, last = step(tokens[:, 13:], state)
    other, _ = step(tokens[:, :17].flip(1), state)
    again, _ = step(tokens[:, 13:], state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert int(last["position"]) == 30


def test_a_program_of_single_tokens(tmp_path):
    """One that reads token by token takes any lookahead."""
    model = make_model(**ONE_BLOCK, fwpkm_lookahead=3)
    export(model, tmp_path / "step", max_length=1)
    tokens = Draw(3).integers(32, 2, sum(PIECES))
    assert_close(of_step(load(tmp_path / "step", False), tokens), of_model(model, tokens), rtol=1e-4, atol=1e-4)


ALONE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from fwpkm.compile import load

folder = Path(sys.argv[1])
step, given = load(folder / "step"), load_file(folder / "given.safetensors")
state, logits = step.start(), []
for piece in given["tokens"].split(given["pieces"].tolist(), 1):
    found, state = step(piece, state)
    logits.append(found)
save_file({"logits": torch.cat(logits, 1)}, folder / "found.safetensors")
"""


@pytest.mark.unpoisoned
def test_a_package_needs_only_the_operators(tmp_path):
    """Compiled ahead of time, and run by a process that has no model."""
    model = make_model(**ONE_BLOCK)
    export(model, tmp_path / "step", compiled=True)
    tokens = Draw(4).integers(32, 2, sum(PIECES))
    save_file({"tokens": tokens, "pieces": torch.tensor(PIECES)}, tmp_path / "given.safetensors")
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")["logits"]
    assert_close(found, of_model(model, tokens), rtol=1e-4, atol=1e-4)


def test_the_command(tmp_path):
    model = make_model(**ONE_BLOCK)
    model.save_pretrained(tmp_path / "model")
    arguments = [
        "export",
        tmp_path / "model",
        tmp_path / "step",
        "--capacity",
        CAPACITY,
        "--max-length",
        1,
        "--program-only",
    ]
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    tokens = Draw(5).integers(32, 1, sum(PIECES))
    assert_close(of_step(load(tmp_path / "step", False), tokens), of_model(model, tokens), rtol=1e-4, atol=1e-4)
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 2
    assert "expected a folder that does not exist yet" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ({"layer_types": ["linear_attention"] * 2}, {}, "expected no 'linear_attention' in a model to export"),
        ({"attn_implementation": "eager"}, {}, "attn_implementation is 'eager'; expected 'windowed_sdpa' or 'sdpa'"),
        ({}, {"batch": 0}, "batch is 0; expected a positive integer"),
        ({}, {"capacity": 0}, "capacity is 0; expected a positive integer"),
        ({}, {"max_length": 10}, "max_length is 10; expected a number of tokens up to 9"),
        ({}, {"capacity": 5, "max_length": 6}, "max_length is 6; expected a number of tokens up to 5"),
        ({"fwpkm_lookahead": 3}, {"max_length": 2}, "max_length is 2; expected a number of tokens up to 1"),
    ],
)
def test_export_says_what_is_wrong(tmp_path, layout, options, message):
    with pytest.raises(ValueError, match=message):
        export(make_model(**layout), tmp_path / "step", **options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    model = make_model(fwpkm_layers=[]).train()
    with pytest.raises(OSError, match="disk full"):
        export(model, tmp_path / "step")
    assert not list(tmp_path.iterdir())
    assert model.training


@in_one_layout
@pytest.mark.parametrize(
    ("tokens", "change", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), {}, r"input_ids.shape is \[3, 4\]; expected \[2, T\]"),
        (torch.zeros(2, 4), {}, "input_ids.dtype is torch.float32; expected torch.int64"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, r"input_ids.shape\[1\] is 0; expected at least one token"),
        (torch.full((2, 4), 32), {}, r"input_ids is in \[32, 32\]; expected tokens in \[0, 32\)"),
        (torch.full((2, 4), -1), {}, r"input_ids is in \[-1, -1\]; expected tokens in \[0, 32\)"),
        (
            torch.zeros(2, 4, dtype=torch.int64),
            {"position": torch.tensor(CAPACITY - 3)},
            r"input_ids.shape\[1\] is 4; expected at most 3: the state has room for 70 tokens, and holds 67",
        ),
        (torch.zeros(2, 4, dtype=torch.int64), {"x": torch.zeros(1)}, "expected a state of this program"),
        (
            torch.zeros(2, 4, dtype=torch.int64),
            {"position": torch.zeros(1, dtype=torch.int64)},
            r"state\['position'\].shape is \[1\]; expected \[\]",
        ),
        (torch.zeros(2, 4, dtype=torch.int64), {"position": torch.tensor(0.0)}, "dtype is torch.float32; expected"),
    ],
)
def test_a_step_says_what_is_wrong(exported, tokens, change, message):
    step = exported[2]
    with pytest.raises(ValueError, match=message):
        step(tokens, step.start() | change)


@in_one_layout
def test_load_says_what_is_wrong(exported, tmp_path):
    path = exported[1]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"compiled is True; expected False: {path} has no package"):
        load(path)
    shutil.copytree(path, tmp_path / "step")
    about = json.loads((path / "step.json").read_text())
    for change, message in [
        ({"format": "x"}, "the format of .* is x; expected fwpkm.Step"),
        ({"version": 2}, "the version of .* is 2; expected 1"),
        ({"torch": "1.0"}, "torch is .*; expected 1.0, which .* was made with"),
    ]:
        (tmp_path / "step" / "step.json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "step", compiled=False)
    for content, message in [("{", "step.json is not JSON"), ("[]", "the format of .* is another; expected")]:
        (tmp_path / "step" / "step.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "step", compiled=False)
