"""Checkpoints: whole or absent whatever interrupts, refused when damaged or of another training."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fwpkm.data.text import standard_library
from fwpkm.data.tokens import Tokens
from fwpkm.files import atomic_folder, remove_folder, remove_unfinished
from fwpkm.training import checkpoint
from fwpkm.training.loop import train
from tests import children
from tests.children import records
from tests.test_models import make_model
from tests.test_training import SETTINGS, make_tokens

STEPS = 4
LAST = Path("checkpoints") / f"step-{STEPS:08d}"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a tiny training on five files."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "text").mkdir()
    large = [path for path in standard_library() if path.stat().st_size > 4000]
    for i, path in enumerate(large[:100:20]):
        (folder / "text" / f"{i}.py").write_bytes(path.read_bytes()[:4000])
    (folder / "config.json").write_text(json.dumps(children.CONFIG))
    given = {
        "text": folder / "text",
        "config": folder / "config.json",
        "steps": STEPS,
        "batch": 2,
        "length": 24,
        "save-every": 1,
        "evaluate-every": 3,
        "evaluate-tokens": 200,
        "warmup": 2,
    }
    return [str(x) for name, value in given.items() for x in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options):
    """The same training, not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert children.finish(children.start(children.command, "train", str(out), *options)) == 0
    return out


def assert_same(out, whole):
    """The same metrics and, to the bit, the same model and optimizer; nothing is left over."""
    assert records(out) == records(whole)
    for name in ("model.safetensors", "optimizer.tensors"):
        assert (out / LAST / name).read_bytes() == (whole / LAST / name).read_bytes()
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (out, whole)]
    assert names[0] == names[1]


def test_killed_before_any_change_of_files_it_goes_on_to_the_same(tmp_path, options, whole):
    """Each attempt is killed a few changes later than the one before: within data, checkpoints, pruning, metrics."""
    out, exit_codes = tmp_path / "out", []
    for event in (1, 3, 5, 7, 9, 10, 11, 12, 13, 14, 12, 11, 13, 10, 12, 14, 11):
        child = children.start(children.command_killed, event, str(out), "train", str(out), *options)
        exit_codes.append(children.finish(child))
        if exit_codes[-1] == 0:
            break
    killed = exit_codes.count(-signal.SIGKILL)
    assert killed >= 8
    assert set(exit_codes) <= {0, -signal.SIGKILL}
    assert children.finish(children.start(children.command, "train", str(out), *options)) == 0
    assert_same(out, whole)


@pytest.mark.parametrize("event", range(14, 36, 3))
def test_killed_once_it_goes_on_to_the_same(tmp_path, options, whole, event):
    out = tmp_path / "out"
    child = children.start(children.command_killed, event, str(out), "train", str(out), *options)
    assert children.finish(child) in (-signal.SIGKILL, 0)
    assert children.finish(children.start(children.command, "train", str(out), *options)) == 0
    assert_same(out, whole)


def test_killed_at_any_time_it_goes_on_to_the_same(tmp_path, options, whole):
    rng = np.random.default_rng()
    out = tmp_path / "out"
    for _ in range(6):
        child = children.start(children.command, "train", str(out), *options)
        time.sleep(rng.uniform(0.1, 0.8))
        child.kill()
        assert children.finish(child) in (-signal.SIGKILL, 0)
    assert children.finish(children.start(children.command, "train", str(out), *options)) == 0
    assert_same(out, whole)


def killed_in_the_middle_of_a_file(saves: int, *args: str) -> None:
    write = checkpoint.save_file

    def half(tensors, path):
        nonlocal saves
        write(tensors, path)
        saves -= 1
        if saves == 0:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half
    children.command(*args)


def test_killed_in_the_middle_of_a_checkpoint_it_goes_on_from_the_one_before(tmp_path, options, whole):
    out = tmp_path / "out"
    child = children.start(killed_in_the_middle_of_a_file, 3, "train", str(out), *options)
    assert children.finish(child) == -signal.SIGKILL
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names[0].startswith(".step-00000003.unfinished-")
    assert names[1:] == ["step-00000001", "step-00000002"]
    assert children.finish(children.start(children.command, "train", str(out), *options)) == 0
    assert_same(out, whole)


def test_the_command_itself_killed(tmp_path, options, whole):
    """As a user starts it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fwpkm.cli", "train", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = out / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.01)
        run.kill()
        run.communicate()
    assert run.returncode == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "Trained 4 steps. Held-out text: perplexity" in done.stdout
    assert done.stderr == ""
    assert_same(out, whole)


def test_a_checkpoint_is_a_model_of_transformers_and_holds_no_pickle(tmp_path):
    model = make_model()
    outcome = train(model, make_tokens(), SETTINGS, tmp_path)
    assert sorted(path.name for path in outcome.checkpoint.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_fwpkm.py",
        "optimizer.tensors",
        "training.json",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(outcome.checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    optimizer = load_file(outcome.checkpoint / "optimizer.tensors")
    names = {name for name, _ in model.named_parameters()}
    assert optimizer.keys() == {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {float(t) for name, t in optimizer.items() if name.endswith(".step")} == {5.0}
    state = checkpoint.read(outcome.checkpoint)
    assert (state.step, state.data) == (5, {"text": 0})
    assert state.settings == dataclasses.asdict(SETTINGS)


def test_the_latest_are_kept(tmp_path):
    for keep, want in ((1, ["step-00000005"]), (3, ["step-00000002", "step-00000004", "step-00000005"])):
        train(make_model(), make_tokens(), dataclasses.replace(SETTINGS, keep=keep), tmp_path / str(keep))
        assert sorted(path.name for path in (tmp_path / str(keep) / "checkpoints").iterdir()) == want


def test_tied_weights_are_saved_once_and_come_back(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=2, save_every=1)
    train(make_model(tie_word_embeddings=True), make_tokens(), settings, tmp_path)
    saved = load_file(checkpoint.latest(tmp_path / "checkpoints") / "model.safetensors")
    assert "model.embed_tokens.weight" in saved
    assert "lm_head.weight" not in saved
    model = make_model(tie_word_embeddings=True)
    train(model, make_tokens(), dataclasses.replace(SETTINGS, steps=3), tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_fwpkm.py",
        "optimizer.tensors",
        "training.json",
    ],
)
def test_a_damaged_file_is_named(tmp_path, name):
    """Cut short, one bit changed, or missing; without the last checkpoint the training goes on from the one before."""
    outcome = train(make_model(), make_tokens(), SETTINGS, tmp_path)
    path = outcome.checkpoint / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1 if name != "training.json" else 0x80
    for damaged in (content[: len(content) // 2], bytes(flipped), None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path} is damaged or missing; delete {outcome.checkpoint} to go on"):
            train(make_model(), make_tokens(), SETTINGS, tmp_path)
        path.write_bytes(content)
    want = records(tmp_path)
    remove_folder(outcome.checkpoint)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000004"
    assert train(make_model(), make_tokens(), SETTINGS, tmp_path).step == 5
    assert records(tmp_path) == want


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = train(make_model(), make_tokens(), SETTINGS, tmp_path).checkpoint / "training.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=rf"format of {path} is 2; expected 1"):
        train(make_model(), make_tokens(), SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("settings", "tokens", "model", "message"),
    [
        ({"batch": 8}, {}, {}, "batch is 8; expected 4, as in .*step-00000005, or another folder"),
        ({"learning_rate": 0.1}, {}, {}, "learning_rate is 0.1; expected 0.01, as in"),
        ({"precision": "bf16"}, {}, {}, "precision is 'bf16'; expected 'no', as in"),
        ({}, {"seed": 3}, {}, "text is 3; expected 0, as in"),
        ({}, {}, {"fwpkm_chunk_size": 4}, "fwpkm_chunk_size is 4; expected 8, as in"),
        ({}, {}, {"hidden_size": 32}, "hidden_size is 32; expected 16, as in"),
        ({"steps": 5, "save_every": 9, "keep": 4, "gradient_checkpointing": True}, {}, {}, None),
    ],
)
def test_a_training_goes_on_with_the_same_settings_data_and_model_only(tmp_path, settings, tokens, model, message):
    train(make_model(), make_tokens(), SETTINGS, tmp_path)
    refusal = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with refusal:
        train(make_model(**model), make_tokens(**tokens), dataclasses.replace(SETTINGS, **settings), tmp_path)


class FullDisk:
    """A file system that is full after so many more writes of tensors."""

    def __init__(self, monkeypatch, files: int) -> None:
        self.files, self.write = files, checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", self)

    def __call__(self, tensors, path) -> None:
        self.files -= 1
        if self.files < 0:
            path.write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.write(tensors, path)


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(make_model(), make_tokens(), SETTINGS, whole)
    with monkeypatch.context() as patch:
        FullDisk(patch, files=1)
        with pytest.raises(OSError, match="No space left on device"):
            train(make_model(), make_tokens(), SETTINGS, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    train(make_model(), make_tokens(), SETTINGS, out)
    assert records(out) == records(whole)


def test_what_the_writer_of_tensors_reports_is_an_error_of_the_file(tmp_path):
    """Its own exception is none of the operating system's."""
    state = checkpoint.TrainingState(1, 0.0, {}, {})
    with pytest.raises(OSError, match=r"cannot write .*step-00000001: "):
        checkpoint.save(tmp_path, state, lambda folder: (folder / "optimizer.tensors").mkdir(), {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_whole_or_absent(tmp_path):
    def interrupted(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a" / "b") as folder:
        interrupted(folder)
    assert list((tmp_path / "a").iterdir()) == []
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("all")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "all"
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b" / "file").read_text() == "all"


def interrupted(*args):
    raise KeyboardInterrupt


def test_a_folder_that_is_being_removed_has_lost_its_name(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("all")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_left_unfinished_is_cleaned_away(tmp_path):
    kept = [tmp_path / name for name in ("file", ".hidden", ".a.unfinished", "a.unfinished-00000000")]
    left = [tmp_path / name for name in (".file.unfinished-0123abcd", ".step-00000001.unfinished-89abcdef")]
    for path in (*kept, left[0]):
        path.write_text("")
    left[1].mkdir()
    (left[1] / "file").write_text("")
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "nowhere")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_find(tmp_path):
    with pytest.raises(
        ValueError, match=r"checkpoint is .*; expected a folder with config.json, or that of a training"
    ):
        checkpoint.find(tmp_path)
    outcome = train(make_model(), make_tokens(), SETTINGS, tmp_path)
    assert checkpoint.find(tmp_path) == outcome.checkpoint
    assert checkpoint.find(outcome.checkpoint) == outcome.checkpoint


def test_data_may_be_any_json(tmp_path):
    tokens = Tokens(make_tokens().train, make_tokens().held_out, source={"text": ("a", "b"), "column": None})
    settings = dataclasses.replace(SETTINGS, steps=1)
    train(make_model(), tokens, settings, tmp_path)
    train(make_model(), tokens, dataclasses.replace(settings, steps=2), tmp_path)
