"""``fwpkm train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fwpkm.checks import require
from fwpkm.cli.console import console, errors_in_one_line, progress_bars
from fwpkm.data import tokens as token_files
from fwpkm.data.codec import Codec
from fwpkm.data.text import Document, dataset_documents, file_documents, standard_library, text_files
from fwpkm.models import FwPKMForCausalLM, presets
from fwpkm.training import checkpoint, metrics, processes
from fwpkm.training.loop import Outcome
from fwpkm.training.loop import train as train_model
from fwpkm.training.settings import TrainingSettings

DEFAULT = TrainingSettings()
DEFAULT_PRESET = "tiny"


def train(
    out: Annotated[Path, typer.Argument(help="Folder of the training; one with checkpoints goes on from the latest.")],
    text: Annotated[list[Path], typer.Option(help="Text file or folder; may be repeated.")] = [],  # noqa: B006
    dataset: Annotated[str | None, typer.Option(help="Hugging Face data set, or NAME:CONFIGURATION.")] = None,
    column: Annotated[str, typer.Option(help="Where the data set has its text.")] = "text",
    tokenizer: Annotated[
        str | None, typer.Option(help="Hugging Face tokenizer; without one, tokens are bytes.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Model: {' or '.join(presets.PRESETS)}; {DEFAULT_PRESET} unless given.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Model: JSON file with fields of FwPKMConfig.")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="Model: checkpoint, or folder of a training.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = DEFAULT.steps,
    batch: Annotated[int, typer.Option(help="Sequences a step, over all processes.")] = DEFAULT.batch,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = DEFAULT.length,
    accumulate: Annotated[int, typer.Option(help="Passes a step, to need less memory.")] = DEFAULT.accumulate,
    learning_rate: Annotated[float, typer.Option(help="Peak of AdamW's.")] = DEFAULT.learning_rate,
    warmup: Annotated[int, typer.Option(help="Steps until that peak.")] = DEFAULT.warmup,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = DEFAULT.weight_decay,
    memory_learning_rate: Annotated[
        float, typer.Option(help="Constant rate of what memories learn by gradient.")
    ] = DEFAULT.memory_learning_rate,
    clip: Annotated[float, typer.Option(help="Norm that gradients are cut to.")] = DEFAULT.clip,
    precision: Annotated[str, typer.Option(help="no: float32; bf16: bfloat16 autocast.")] = DEFAULT.precision,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute activations twice, all but addresses."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the weights and the sequences.")] = DEFAULT.seed,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = DEFAULT.save_every,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = DEFAULT.evaluate_every,
    evaluate_tokens: Annotated[int, typer.Option(help="Held-out tokens evaluated on.")] = DEFAULT.evaluate_tokens,
    keep: Annotated[int, typer.Option(help="Checkpoints kept.")] = DEFAULT.keep,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Spread the parameters over the processes.")] = False,
) -> None:
    """Train a language model on text: Python's standard library, unless --text or --dataset name another.

    Stopped by Ctrl-C, SIGTERM or anything else, the same command goes on from the latest checkpoint.

    In several processes: torchrun --nproc-per-node 2 -m fwpkm.cli train ...
    """
    with errors_in_one_line():
        settings = TrainingSettings(
            steps=steps,
            batch=batch,
            length=length,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            memory_learning_rate=memory_learning_rate,
            clip=clip,
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            save_every=save_every,
            evaluate_every=evaluate_every,
            evaluate_tokens=evaluate_tokens,
            keep=keep,
        )
        accelerator = processes.start()
        start = start and checkpoint.find(start)
        codec = Codec.load(tokenizer) if tokenizer else Codec.of_checkpoint(start) if start else Codec()
        torch.manual_seed(seed)
        model = _model(preset, config, start, codec)
        with accelerator.main_process_first():
            source = _source(text, dataset, column) | {
                "tokenizer": tokenizer or (str(start) if codec.tokenizer else None)
            }
            token_files.prepare(out / "data", lambda: _documents(text, dataset, column), codec, source)
        with progress_bars(visible=accelerator.is_main_process) as progress:
            outcome = train_model(model, token_files.load(out / "data"), settings, out, codec, fsdp, progress)
    if accelerator.is_main_process:
        _report(out, outcome, settings)
    accelerator.end_training()
    if outcome.signal:
        raise typer.Exit(128 + outcome.signal)


def _model(name: str | None, config: Path | None, start: Path | None, codec: Codec) -> FwPKMForCausalLM:
    given = [option for option, value in (("--preset", name), ("--config", config), ("--from", start)) if value]
    require(len(given) <= 1, "model", " and ".join(given), "one of them")
    if start:
        model = FwPKMForCausalLM.from_pretrained(start)
    else:
        fields = {"vocab_size": codec.vocab_size, "eos_token_id": codec.end}
        described = (
            presets.read_config(config, **fields) if config else presets.preset(name or DEFAULT_PRESET, **fields)
        )
        model = FwPKMForCausalLM(described)
    size = model.config.vocab_size
    require(size >= codec.vocab_size, "vocab_size", size, "at least the {} tokens of the text", codec.vocab_size)
    return model


def _source(text: list[Path], dataset: str | None, column: str) -> dict[str, Any]:
    """What says where the text comes from; the same again when a training goes on."""
    require(not (text and dataset), "text", "given as --text and as --dataset", "one of them")
    if dataset:
        return {"dataset": dataset, "column": column}
    return {"text": [str(path.resolve()) for path in text] or "Python standard library"}


def _documents(text: list[Path], dataset: str | None, column: str) -> list[Document]:
    if dataset:
        return dataset_documents(dataset, column)
    return file_documents([file for path in text for file in text_files(path)] if text else standard_library())


def _report(out: Path, outcome: Outcome, settings: TrainingSettings) -> None:
    if outcome.signal:
        console.print(
            f"Stopped after step {outcome.step:,} of {settings.steps:,}; the same command goes on from there."
        )
        return
    evaluations = [record for record in metrics.read(out / "metrics.jsonl") if "held_out_loss" in record]
    last = evaluations[-1]
    console.print(
        f"Trained {outcome.step:,} steps. Held-out text: perplexity {last['held_out_perplexity']:.2f} a token, "
        f"{last['held_out_nats_per_byte']:.3f} nats a byte.\n"
        f"Checkpoint: {outcome.checkpoint}\nMetrics:    {out / 'metrics.jsonl'}\nPicture:    {out / 'training.png'}"
    )
