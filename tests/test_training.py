"""The training loop: what a step computes, evaluation, precision, stopping and going on."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fwpkm.data.tokens import Tokens, batch
from fwpkm.evaluation.perplexity import perplexity
from fwpkm.memory import KEY_UPDATES
from fwpkm.models import FwPKMForCausalLM
from fwpkm.report.theme import LIGHT
from fwpkm.report.training import draw_training
from fwpkm.training import metrics, processes
from fwpkm.training.interrupt import interruptible
from fwpkm.training.loop import train
from fwpkm.training.settings import TrainingSettings
from tests.children import records
from tests.draws import Draw, seeds
from tests.test_models import make_model

SETTINGS = TrainingSettings(
    steps=5, batch=4, length=24, warmup=2, save_every=2, evaluate_every=3, evaluate_tokens=400, learning_rate=1e-2
)


def make_tokens(seed: int = 0) -> Tokens:
    text = Draw(seed).integers(32, 5000).numpy().astype(np.uint8)
    return Tokens(text[:4000], text[4000:], source={"text": seed})


@given(seed=seeds, step=st.integers(1, 10**6), rows=st.integers(1, 6), length=st.integers(2, 40))
def test_batches_are_windows_of_the_text_and_replay(seed, step, rows, length):
    text = np.arange(200, dtype=np.uint8)
    made = batch(text, seed, step, rows, length)
    assert made.dtype == np.int64
    assert made.shape == (rows, length)
    assert (np.diff(made) == 1).all()
    assert np.array_equal(made, batch(text, seed, step, rows, length))
    others = [batch(text, seed, step + 1, 6, 4), batch(text, seed + 1, step, 6, 4)]
    assert not any(np.array_equal(batch(text, seed, step, 6, 4), other) for other in others)


def test_every_window_of_a_text_is_drawn():
    starts = batch(np.arange(12, dtype=np.uint8), 0, 1, 400, 4)[:, 0]
    assert set(starts) == set(range(9))


def test_a_text_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="text is 5 tokens long; expected at least the 6 of a sequence"):
        batch(np.arange(5, dtype=np.uint8), 0, 1, 1, 6)


def test_it_trains_as_a_plain_loop_does(tmp_path):
    """Losses, gradient norms, learning rates, held-out perplexity and weights of a loop written out here."""
    tokens, model = make_tokens(), make_model(fwpkm_key_update="slow").train()
    plain = make_model(fwpkm_key_update="slow").train()
    outcome = train(model, tokens, SETTINGS, tmp_path)
    assert (outcome.step, outcome.signal) == (5, None)
    keys = [memory.keys for memory in plain.memories()]
    others = [p for p in plain.parameters() if all(p is not key for key in keys)]
    matrices, vectors = ([p for p in others if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}, {"params": keys, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    rates = [0.5, 1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * i / 3)) for i in (1, 2, 3)]
    want = []
    for step, rate in enumerate(rates, start=1):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * rate
        rows = torch.from_numpy(batch(tokens.train, 0, step, 4, 24))
        result = plain(rows, labels=rows)
        result.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        want.append(
            {
                "step": step,
                "loss": cross_entropy(result.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item(),
                "objective": result.loss.item(),
                "gate": result.mean_gate.item(),
                "addressing_loss": result.addressing_loss.item(),
                "gradient_norm": norm.item(),
                "learning_rate": 1e-2 * rate,
                "tokens": step * 96,
            }
        )
    have = [record for record in records(tmp_path) if "loss" in record]
    assert len(have) == 5
    for a, b in zip(have, want, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    saved = FwPKMForCausalLM.from_pretrained(outcome.checkpoint)
    for name, tensor in plain.state_dict().items():
        assert_close(saved.state_dict()[name], tensor)
    evaluations = [record for record in records(tmp_path) if "held_out_loss" in record]
    assert [record["step"] for record in evaluations] == [3, 5]
    measured = perplexity(saved, tokens.held_out[:400], rows=4)
    assert evaluations[-1]["held_out_loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert evaluations[-1]["held_out_perplexity"] == pytest.approx(measured["perplexity"], rel=1e-5)


def test_it_learns(tmp_path):
    text = np.tile(np.arange(32, dtype=np.uint8), 100)
    settings = dataclasses.replace(SETTINGS, steps=40, save_every=40, evaluate_every=40)
    train(make_model(), Tokens(text[:2400], text[2400:], bytes_per_token=2.0), settings, tmp_path)
    log = metrics.read(tmp_path / "metrics.jsonl")
    assert log[-1]["held_out_loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["held_out_nats_per_byte"] == log[-1]["held_out_loss"] / 2
    assert log[-1]["held_out_perplexity"] == pytest.approx(math.exp(log[-1]["held_out_loss"]))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    for record in log[:-1]:
        assert record["seconds"] > 0
        assert record["tokens_per_second"] > 0


def test_passes_that_add_up_train_alike(tmp_path):
    runs = []
    for accumulate in (1, 2, 4):
        settings = dataclasses.replace(SETTINGS, accumulate=accumulate, evaluate_every=5)
        train(make_model(), make_tokens(), settings, tmp_path / str(accumulate))
        runs.append([record for record in records(tmp_path / str(accumulate)) if "loss" in record])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("scope", ["sequence", "shared"])
@pytest.mark.parametrize("key_update", KEY_UPDATES)
def test_gradient_checkpointing_changes_no_gradient(key_update, scope):
    model = make_model(fwpkm_key_update=key_update, fwpkm_scope=scope, fwpkm_gate_weight=0.1).train()
    tokens = torch.randint(32, (2, 29))  # with an open chunk at the end
    want = model(tokens, labels=tokens)
    want.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.discard()  # what a shared memory has stored
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model.checkpoint_blocks()
    have = model(tokens, labels=tokens)
    have.loss.backward()
    assert len(calls) == 2  # once more in the backward
    assert_close(have.loss, want.loss, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=0, atol=0)


def test_gradient_checkpointing_and_bfloat16_in_training(tmp_path):
    runs = {}
    for name, options in (
        ("plain", {}),
        ("checkpointing", {"gradient_checkpointing": True}),
        ("bf16", {"precision": "bf16"}),
    ):
        model = make_model()
        outcome = train(model, make_tokens(), dataclasses.replace(SETTINGS, **options), tmp_path / name)
        runs[name] = records(tmp_path / name)
        assert model.model.layers[0].gradient_checkpointing == (name == "checkpointing")
        saved = FwPKMForCausalLM.from_pretrained(outcome.checkpoint)
        assert {tensor.dtype for tensor in saved.state_dict().values()} == {torch.float32}
    assert runs["checkpointing"] == runs["plain"]
    losses = {name: torch.tensor([r["loss"] for r in run if "loss" in r]) for name, run in runs.items()}
    assert not torch.equal(losses["bf16"], losses["plain"])
    assert_close(losses["bf16"], losses["plain"], rtol=1e-2, atol=0)


def test_memories_stay_float32_under_autocast():
    model = make_model().train()
    tokens = torch.randint(32, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(tokens, use_cache=True, output_memories=True)
    assert result.logits.dtype == torch.bfloat16
    for layer in result.past_key_values.memories.values():
        assert {layer.memory.keys.dtype, layer.memory.values.dtype, layer.memory.log.residuals.dtype} == {torch.float32}
    assert {gate.dtype for gate in result.gates} == {torch.float32}


def stop_at(step: int, number: int):
    """A progress callback that gets a signal sent in ``step``."""

    def progress(what: str, done: int, total: int) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    return progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_and_the_training_goes_on_to_the_same_losses(tmp_path, number):
    """Dropout included: what is random in a step depends on the step."""
    options = {"attention_dropout": 0.3, "layer_types": ["full_attention"] * 2}
    settings = dataclasses.replace(SETTINGS, save_every=100)
    train(make_model(**options), make_tokens(), settings, tmp_path / "whole")
    out, before = tmp_path / "out", signal.getsignal(number)
    outcome = train(make_model(**options), make_tokens(), settings, out, progress=stop_at(2, number))
    assert (outcome.step, outcome.signal, outcome.checkpoint.name) == (2, number, "step-00000002")
    assert signal.getsignal(number) is before
    torch.manual_seed(1234)
    outcome = train(make_model(seed=5, **options), make_tokens(), settings, out)
    assert (outcome.step, outcome.signal) == (5, None)
    assert records(out) == records(tmp_path / "whole")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["seconds"] for record in steps if "loss" in record]
    assert seconds == sorted(seconds)


def test_a_finished_training_is_left_as_it_is_and_more_steps_go_on(tmp_path):
    train(make_model(), make_tokens(), SETTINGS, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    first = records(tmp_path)
    outcome = train(make_model(), make_tokens(), SETTINGS, tmp_path)
    assert outcome.step == 5
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    assert records(tmp_path) == first
    outcome = train(make_model(), make_tokens(), dataclasses.replace(SETTINGS, steps=7), tmp_path)
    assert outcome.step == 7
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7]


def test_a_second_signal_acts_as_always():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us without one
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice():
    with interruptible() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_metrics_are_cut_at_the_step_and_at_an_unfinished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "held_out_loss": 3.5}\n{"step": 3}\n{"step": 4, "lo')
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 2, 3]
    with metrics.Metrics(path, step=2) as log:
        log.append({"step": 3, "loss": 1.5})
        assert path.read_text().endswith('{"step": 3, "loss": 1.5}\n')  # seen at once
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 2, 3]


def test_the_picture_shows_the_records():
    steps = [{"step": i, "loss": 4.0 / i, "gradient_norm": 1.0 + i, "gate": 0.1 * i} for i in (1, 2, 3)]
    records = [*steps, {"step": 3, "held_out_loss": 2.5}]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in lines(draw_training({"records": records}, LIGHT))}
    assert drawn["training text"] == [[1, 4.0], [2, 2.0], [3, 4 / 3]]
    assert drawn["held-out text"] == [[3, 2.5]]
    assert drawn["gradient norm"] == [[1, 2.0], [2, 3.0], [3, 4.0]]
    assert drawn["mean gate"] == [[record["step"], record["gate"]] for record in steps]
    without_memory = [{"step": 1, "loss": 4.0, "gradient_norm": 1.0}]
    drawn = [line.get_label() for line in lines(draw_training({"records": without_memory}, LIGHT))]
    assert drawn == ["training text", "gradient norm"]


def lines(figure):
    return [line for panel in figure.axes for line in panel.lines]


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="loss of step 1 is nan; expected a finite number"):
        train(model, make_tokens(), SETTINGS, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; expected a positive integer"),
        ({"batch": 0}, "batch is 0; expected a positive integer"),
        ({"length": 1}, "length is 1; expected at least 2: the first token is not predicted"),
        ({"accumulate": 0}, "accumulate is 0; expected a positive integer"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number"),
        ({"warmup": -1}, "warmup is -1; expected a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; expected a number >= 0"),
        ({"clip": 0.0}, "clip is 0.0; expected a positive number"),
        ({"precision": "fp16"}, "precision is 'fp16'; expected 'no' or 'bf16'"),
        ({"seed": -1}, "seed is -1; expected a number >= 0"),
        ({"save_every": 0}, "save_every is 0; expected a positive integer"),
        ({"evaluate_every": 0}, "evaluate_every is 0; expected a positive integer"),
        ({"evaluate_tokens": 1}, "evaluate_tokens is 1; expected at least 2"),
        ({"keep": 0}, "keep is 0; expected a positive integer"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 3}, r"batch is 4; expected a multiple of 3, processes \(1\) times accumulate \(3\)"),
        ({"length": 4001}, "text is 4000 tokens long; expected at least the 4001 of a sequence"),
        ({"evaluate_tokens": 7}, "text is 7 tokens long; expected at least 8 tokens"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(make_model(), make_tokens(), dataclasses.replace(SETTINGS, **options), tmp_path)


def test_a_launcher_that_wraps_models_itself_is_refused(monkeypatch):
    class Launched:
        distributed_type = DistributedType.DEEPSPEED

    monkeypatch.setattr(processes, "Accelerator", lambda **options: Launched())
    with pytest.raises(ValueError, match="distributed type is DEEPSPEED; expected plain processes; fsdp is an option"):
        processes.start()


def test_several_processes_are_asked_for_by_their_starter(tmp_path):
    with pytest.raises(ValueError, match="fsdp is True; expected several processes, from torchrun or accelerate"):
        train(make_model(), make_tokens(), SETTINGS, tmp_path, fsdp=True)
