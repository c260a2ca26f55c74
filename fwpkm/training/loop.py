"""Train a language model on text; stop and go on at any step, in one process or several."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fwpkm.checks import require
from fwpkm.data.codec import Codec
from fwpkm.data.tokens import Tokens, batch
from fwpkm.evaluation.perplexity import side_by_side, summary, token_losses
from fwpkm.files import remove_unfinished
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM, FwPKMOutput
from fwpkm.progress import Progress
from fwpkm.report.plots import write_picture
from fwpkm.report.training import draw_training
from fwpkm.training import checkpoint, processes
from fwpkm.training.checkpoint import TrainingState
from fwpkm.training.interrupt import interruptible
from fwpkm.training.metrics import Metrics, Record, read
from fwpkm.training.optimizer import parameter_groups
from fwpkm.training.settings import CHANGEABLE, TrainingSettings


@dataclass(frozen=True)
class Outcome:
    """Where a call of :func:`train` has got to.

    Args:
        step: steps done.
        checkpoint: of that step.
        signal: what has stopped it before all steps were done, or None.
    """

    step: int
    checkpoint: Path
    signal: int | None


def train(
    model: FwPKMForCausalLM,
    tokens: Tokens,
    settings: TrainingSettings,
    out: Path,
    codec: Codec = Codec(),
    fsdp: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Train ``model``, or go on where an earlier call with the same ``out`` has stopped.

    ``out`` gets ``checkpoints/`` (:mod:`fwpkm.training.checkpoint`), ``metrics.jsonl`` and ``training.png``. SIGINT and
    SIGTERM end the step at hand, and save. With several processes, each calls this.

    Args:
        model: the same in every process; its weights are replaced by those of the latest checkpoint.
        tokens: to train and to evaluate on.
        settings: how.
        out: folder of this training.
        codec: saved with the model.
        fsdp: spread parameters and optimizer over the processes.
        progress: told after each step.

    Raises:
        ValueError: if ``out`` has a checkpoint of other settings, data or model, or a damaged one; if processes and
            passes do not divide the batch; if the loss is not a finite number any more.
        OSError: if a file cannot be written; the checkpoints that were there are whole.
    """
    accelerator = processes.start()
    main, folder = accelerator.is_main_process, out / "checkpoints"
    if main:
        remove_unfinished(out)
        remove_unfinished(folder)
    accelerator.wait_for_everyone()
    state = TrainingState(0, 0.0, _as_json(dataclasses.asdict(settings)), _as_json(tokens.source))
    path = checkpoint.latest(folder)
    if path is not None:
        state = _resume(model, path, state)
    training = _Training(model, tokens, settings, accelerator, fsdp)
    if path is not None:
        processes.load_optimizer(model, training.optimizer, checkpoint.read_optimizer(path))
    start, asked = time.perf_counter() - state.seconds, 0
    with interruptible() as interrupt, Metrics(out / "metrics.jsonl", state.step, main) as log:
        while state.step < settings.steps and not asked:
            record = training.step(state.step + 1)
            state = dataclasses.replace(state, step=state.step + 1, seconds=time.perf_counter() - start)
            log.append(record | {"seconds": state.seconds})
            progress(f"training: loss {record['loss']:.3f}", state.step, settings.steps)
            last = state.step == settings.steps
            if last or state.step % settings.evaluate_every == 0:
                log.append(training.evaluate(state.step))
                if main:
                    write_picture(draw_training, {"records": read(out / "metrics.jsonl")}, out / "training.png")
            asked = training.agree(interrupt.signal or 0)
            if last or asked or state.step % settings.save_every == 0:
                log.sync()
                path = training.save(folder, state, codec)
    assert path is not None
    return Outcome(state.step, path, asked if state.step < settings.steps else None)


class _Training:
    """A model, its optimizer and its data, in one of the processes that train it."""

    def __init__(
        self,
        model: FwPKMForCausalLM,
        tokens: Tokens,
        settings: TrainingSettings,
        accelerator: Accelerator,
        fsdp: bool,
    ) -> None:
        count, passes = accelerator.num_processes, settings.accumulate
        expected = "a multiple of {}, processes ({}) times accumulate ({})"
        divides = settings.batch % (count * passes) == 0
        require(divides, "batch", settings.batch, expected, count * passes, count, passes)
        self.pieces = side_by_side(tokens.held_out[: settings.evaluate_tokens], settings.batch // passes)
        self.tokens, self.settings, self.accelerator, self.model = tokens, settings, accelerator, model
        self.share = slice(accelerator.process_index, None, count)  # rows of this process
        if settings.gradient_checkpointing:
            model.checkpoint_blocks()
        self.spread = processes.spread(model, accelerator, fsdp)
        rates = settings.learning_rate, settings.weight_decay, settings.memory_learning_rate
        self.optimizer = torch.optim.AdamW(parameter_groups(model, *rates), betas=(0.9, 0.95))

    def step(self, step: int) -> Record:
        """Train one step, counted from 1; what it measured, over all processes."""
        began, settings = time.perf_counter(), self.settings
        # What is random in a step depends on nothing but the step: there is no random state to save.
        seed = np.random.SeedSequence((settings.seed, step, self.accelerator.process_index))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        rows = batch(self.tokens.train, settings.seed, step, settings.batch, settings.length)[self.share]
        self.spread.train()
        measured = []
        for i, part in enumerate(np.split(rows, settings.accumulate), start=1):
            input_ids = torch.from_numpy(part).to(self.accelerator.device)
            with nullcontext() if i == settings.accumulate else self.accelerator.no_sync(self.spread):
                with self._autocast():
                    result = self.spread(input_ids, labels=input_ids)
                (result.loss / settings.accumulate).backward()
            measured.append(torch.stack([x.detach().float() for x in _figures(result).values()]))
        means = self.accelerator.reduce(torch.stack(measured).mean(0), "mean").tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        record = dict(zip(_figures(result), means, strict=True)) | {"gradient_norm": processes.whole(norm).item()}
        for name, value in record.items():
            require(math.isfinite(value), f"{name} of step {step}", value, "a finite number")
        for group in self.optimizer.param_groups[:2]:  # the memories' rate is constant
            group["lr"] = settings.learning_rate * settings.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = settings.batch * settings.length
        return {
            "step": step,
            **record,
            "learning_rate": settings.learning_rate * settings.rate(step),
            "tokens": step * tokens,
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }

    def evaluate(self, step: int) -> Record:
        """Predict held-out text, each process its share of rows."""
        with self._autocast():
            losses = token_losses(self.model, self.pieces[self.share], self.settings.length)
        total = self.accelerator.reduce(losses.double().sum().to(self.accelerator.device), "sum")
        measured = summary(total, self.pieces, self.tokens.bytes_per_token)
        return {"step": step} | {f"held_out_{name}": measured[name] for name in ("loss", "nats_per_byte", "perplexity")}

    def agree(self, number: int) -> int:
        """The highest of the numbers that the processes bring."""
        mine = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def save(self, folder: Path, state: TrainingState, codec: Codec) -> Path:
        """Gather everything in the main process and write it there; the memories are its own."""
        main = self.accelerator.is_main_process
        weights = processes.whole_model(self.model, main)
        optimizer = processes.whole_optimizer(self.model, self.optimizer, main)

        def write(unfinished: Path) -> None:
            codec.save(unfinished)
            self.model.save_pretrained(unfinished, state_dict=weights)

        if main:
            checkpoint.save(folder, state, write, optimizer, self.settings.keep)
        self.accelerator.wait_for_everyone()
        return checkpoint.path_of(folder, state.step)

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)


def _figures(result: FwPKMOutput) -> dict[str, Tensor]:
    """What a forward tells; without a memory there is less."""
    assert result.loss is not None
    assert result.token_loss is not None
    figures = {"loss": result.token_loss, "objective": result.loss}
    if result.mean_gate is not None:
        assert result.addressing_loss is not None
        figures |= {"gate": result.mean_gate, "addressing_loss": result.addressing_loss}
    return figures


def _resume(model: FwPKMForCausalLM, path: Path, wanted: TrainingState) -> TrainingState:
    """Give ``model`` the weights of a checkpoint; where its training stands, with the settings now wanted."""
    state = checkpoint.read(path)
    now, then = ({k: v for k, v in s.settings.items() if k not in CHANGEABLE} for s in (wanted, state))
    _require_same(now, then, path)
    _require_same(wanted.data, state.data, path)
    saved = FwPKMForCausalLM.from_pretrained(path)
    _require_same(_architecture(model), _architecture(saved), path)
    model.load_state_dict(saved.state_dict())
    return dataclasses.replace(wanted, step=state.step, seconds=state.seconds)


def _require_same(wanted: dict[str, Any], kept: dict[str, Any], path: Path) -> None:
    for name in sorted(wanted.keys() | kept.keys()):
        have, want = wanted.get(name), kept.get(name)
        require(have == want, name, repr(have), "{!r}, as in {}, or another folder", want, path)


def _architecture(model: FwPKMForCausalLM) -> dict[str, Any]:
    config = _as_json(model.config.to_dict())
    return {name: config[name] for name in FwPKMConfig.__annotations__ if name in config}


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    read_back: dict[str, Any] = json.loads(json.dumps(value))
    return read_back
