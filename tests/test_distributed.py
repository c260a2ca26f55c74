"""Two processes against one: whole models, spread ones, and going on with another number of processes."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from fwpkm.files import remove_folder
from fwpkm.models import FwPKMForCausalLM
from fwpkm.training import processes
from fwpkm.training.loop import train
from tests import children
from tests.test_models import make_model
from tests.test_training import SETTINGS, make_tokens, stop_at

LONG = dataclasses.replace(SETTINGS, steps=10, evaluate_every=10, save_every=10, learning_rate=1e-3)


def train_here(out, settings, options, fsdp=False):
    train(make_model(**options), make_tokens(), settings, out, fsdp=fsdp)


def assert_alike(out, whole):
    """The same metrics and weights, but for rounding."""
    ours, theirs = children.records(out), children.records(whole)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        norm = a.pop("gradient_norm", 0), b.pop("gradient_norm", 0)
        assert norm[0] == pytest.approx(norm[1], rel=1e-2)
        assert a == pytest.approx(b, rel=1e-4)
    name = "checkpoints/step-00000010"
    have, want = (FwPKMForCausalLM.from_pretrained(run / name).state_dict() for run in (out, whole))
    for key, tensor in want.items():
        assert_close(have[key], tensor, rtol=1e-3, atol=1e-3)


SLOW = {"fwpkm_key_update": "slow", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("fsdp", "settings", "options"),
    [
        (False, {}, {}),
        (False, {"gradient_checkpointing": True}, SLOW),
        (True, {"gradient_checkpointing": True}, SLOW),
        (True, {"accumulate": 2}, {"fwpkm_key_update": "train_only", "fwpkm_gate_weight": 0.1}),
    ],
    ids=["ddp-fast", "ddp-slow", "fsdp-slow", "fsdp-train_only"],
)
def test_two_processes_train_as_one(tmp_path, settings, options, fsdp):
    settings = dataclasses.replace(LONG, **settings)
    train(make_model(**options), make_tokens(), settings, tmp_path / "one")
    children.ranks(2, train_here, tmp_path / "two", settings, options, fsdp)
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_a_training_goes_on_with_another_number_of_processes(tmp_path):
    """One, two with whole models, two with a spread one, one: weights and optimizer move over."""
    settings, out = dataclasses.replace(LONG, save_every=2, keep=20), tmp_path / "out"
    train(make_model(**SLOW), make_tokens(), settings, tmp_path / "one")
    train(make_model(**SLOW), make_tokens(), settings, out)
    for step, fsdp in ((4, False), (6, True), (8, None)):
        for path in (out / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                remove_folder(path)
        if fsdp is None:
            train(make_model(**SLOW), make_tokens(), settings, out)
        else:
            children.ranks(2, train_here, out, settings, SLOW, fsdp)
    assert_alike(out, tmp_path / "one")


def test_bfloat16_spread_over_processes(tmp_path):
    settings = dataclasses.replace(LONG, steps=3, precision="bf16")
    train(make_model(), make_tokens(), settings, tmp_path / "one")
    children.ranks(2, train_here, tmp_path / "two", settings, {}, True)
    one, two = (
        torch.tensor([r["loss"] for r in children.records(tmp_path / n) if "loss" in r]) for n in ("one", "two")
    )
    assert_close(two, one, rtol=1e-2, atol=0)


def plain_ddp(folder):
    """What a user's own loop does: each process brings other fast weights, and other slow ones."""
    accelerator = processes.start()
    rank = accelerator.process_index
    model = make_model(seed=rank)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    wrapped = DistributedDataParallel(model)
    tokens = torch.randint(32, (1, 24))
    wrapped(tokens, labels=tokens).loss.backward()
    after = dict(model.named_buffers())
    fast = [name for name in before if name.endswith(("memory.values", "memory.keys"))]
    assert len(fast) == 4
    assert all(torch.equal(after[name], before[name]) for name in fast)
    weights = model.lm_head.weight.detach()
    gathered = accelerator.gather(torch.stack([weights, model.lm_head.weight.grad]).unsqueeze(0))
    assert torch.equal(gathered[0], gathered[1])  # slow weights come from the first, gradients are averaged
    values = accelerator.gather(after[fast[0]].unsqueeze(0))
    assert not torch.equal(values[0], values[1])
    (folder / str(rank)).write_text("done")


def test_memories_stay_with_their_process_under_plain_ddp(tmp_path):
    children.ranks(2, plain_ddp, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def stop_one(out):
    """Only the second process gets the signal, in step 3."""
    accelerator = processes.start()
    progress = stop_at(3 if accelerator.process_index == 1 else -1, signal.SIGTERM)
    outcome = train(make_model(), make_tokens(), LONG, out, progress=progress)
    assert (outcome.step, outcome.signal, outcome.checkpoint.name) == (3, signal.SIGTERM, "step-00000003")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    children.ranks(2, stop_one, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def refuse_odd_batch(out):
    with pytest.raises(ValueError, match=r"batch is 3; expected a multiple of 2, processes \(2\) times accumulate"):
        train(make_model(), make_tokens(), dataclasses.replace(LONG, batch=3), out)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    children.ranks(2, refuse_odd_batch, tmp_path)


def test_torchrun(tmp_path):
    """As a user starts it: the command in two processes, FSDP, data prepared by one of them."""
    (tmp_path / "text").mkdir()
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text(f"line {i}\n" * 200)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fwpkm.cli", "train", str(tmp_path / "out"), "--text", str(tmp_path / "text"), "--fsdp"]
    command += ["--steps", "2", "--batch", "2", "--length", "32", "--evaluate-tokens", "100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as run:
        try:
            output, _ = run.communicate(timeout=120)
        finally:
            run.terminate()  # if it hangs, its processes end with it
    assert run.returncode == 0, output
    assert output.count("Trained 2 steps") == 1
    assert (tmp_path / "out" / "checkpoints" / "step-00000002" / "model.safetensors").exists()
