"""How to train a language model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fwpkm.checks import require, require_choice

# What may differ when a training goes on. Another number of steps bends the learning rate's decay from there on.
CHANGEABLE = {"steps", "save_every", "evaluate_every", "evaluate_tokens", "keep", "gradient_checkpointing"}


@dataclass(frozen=True)
class TrainingSettings:
    """How :func:`fwpkm.training.loop.train` trains.

    Args:
        steps: optimizer steps.
        batch: sequences a step, over all processes.
        length: tokens a sequence.
        accumulate: passes that a step's sequences are divided into, to need less memory.
        learning_rate: AdamW's, at its peak.
        warmup: steps until there; it then decays along a half cosine to a tenth.
        weight_decay: AdamW's, of matrices outside memories.
        memory_learning_rate: constant, of what memories learn by gradient: values of product-key memories, learned
            initial values and ``slow`` keys (:func:`fwpkm.training.optimizer.parameter_groups`).
        clip: norm that gradients are cut to.
        precision: ``"no"``: float32; ``"bf16"``: bfloat16 autocast. Weights, optimizer and memories are float32.
        gradient_checkpointing: of what blocks compute keep addresses, and the rest again in the backward.
        seed: draws the sequences, and whatever else is random in a step.
        save_every: steps between checkpoints; there is one at the end, too.
        evaluate_every: steps between evaluations on held-out text; there is one at the end, too.
        evaluate_tokens: of held-out text, at most, in an evaluation.
        keep: checkpoints kept.
    """

    steps: int = 1000
    batch: int = 8
    length: int = 512
    accumulate: int = 1
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    memory_learning_rate: float = 1e-3
    clip: float = 1.0
    precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 100
    evaluate_every: int = 100
    evaluate_tokens: int = 1 << 16
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "evaluate_every", "keep"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        for name in ("length", "evaluate_tokens"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2: the first token is not predicted")
        for name in ("learning_rate", "clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("warmup", "weight_decay", "memory_learning_rate", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        require_choice("precision", self.precision, ("no", "bf16"))

    def rate(self, step: int) -> float:
        """Share of the peak learning rate in ``step``, counted from 1."""
        if step <= self.warmup:
            return step / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
