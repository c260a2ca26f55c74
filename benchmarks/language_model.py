"""The language model whose training step and decoding are measured: with memory layers, and without."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.check import WrongResultError, compare
from fwpkm.models import FwPKMForCausalLM, FwPKMOutput
from fwpkm.models.presets import preset

TIED = 0.02  # of the length of all gradients, where slots have changed places


@dataclass(frozen=True)
class Size:
    """A model and a batch (docs/design.md, section 6); everything else is as in the presets.

    The defaults are those of the goal: a memory takes two chunks of 512 tokens a step.
    """

    hidden: int = 256
    intermediate: int = 704
    blocks: int = 6
    vocabulary: int = 8192
    memories: tuple[int, ...] = (1, 4)
    n_subkeys: int = 128
    key_dim: int = 256
    value_dim: int = 256
    chunk: int = 512
    batch: int = 4
    tokens: int = 1024


def make(size: Size, key_update: str | None) -> FwPKMForCausalLM:
    """The model with memory layers whose keys are updated so, or, for None, without them."""
    torch.manual_seed(0)
    config = preset(
        "small",
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        head_dim=size.hidden // 4,
        layer_types=["sliding_attention"] * size.blocks,
        fwpkm_layers=list(size.memories) if key_update else [],
        fwpkm_n_subkeys=size.n_subkeys,
        fwpkm_key_dim=size.key_dim,
        fwpkm_value_dim=size.value_dim,
        fwpkm_chunk_size=size.chunk,
        fwpkm_key_update=key_update or "slow",
    )
    model = FwPKMForCausalLM(config)
    with torch.no_grad():
        for memory in model.memories():  # or comparisons would not see what is stored
            memory.output.weight *= 8
    return model


def draw(size: Size, seed: int, batch: int | None = None, length: int | None = None) -> Tensor:
    """Random tokens ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size.vocabulary, (batch or size.batch, length or size.tokens), generator=generator)


@contextlib.contextmanager
def storing_nothing(model: FwPKMForCausalLM) -> Iterator[None]:
    """The memories of ``model`` stay as they start."""
    config = model.config.memory_config()
    for memory in model.memories():
        memory.config = dataclasses.replace(config, learning_rate=0.0)
    yield
    for memory in model.memories():
        memory.config = config


def step(call: Any, model: FwPKMForCausalLM, ids: Tensor) -> FwPKMOutput:
    """Forward, loss and backward of ``call``, which is ``model`` or ``model`` compiled; no optimizer."""
    model.zero_grad(set_to_none=True)
    output: FwPKMOutput = call(input_ids=ids, labels=ids, output_memories=True)
    assert output.loss is not None
    output.loss.backward()
    return output


def check_step(name: str, call: Any, model: FwPKMForCausalLM, ids: Tensor, tolerance: float) -> dict[str, float]:
    """That ``call``, the compiled model, has eager's loss and gradients: the largest error, the share of other slots.

    Two slots with nearly the same score change places when a query is rounded otherwise (at this size for one token in
    some hundreds), and everything that is read where they wrote then differs a little. So where slots differ, all
    gradients together may by 2% of their length; without such ties, at small sizes, tests/compile compares each number.

    Raises:
        WrongResultError: if a loss or gradient differs by more, or more than 1% of the reads are of other slots.
    """
    (expected, wanted), (output, found) = (_gradients(either, model, ids) for either in (model, call))
    if found.keys() != wanted.keys():
        raise WrongResultError(f"{name}: other parameters have gradients than in eager")
    differ = [(x != y).float().mean() for x, y in zip(output.slots or (), expected.slots or (), strict=True)]
    share = float(torch.stack(differ).mean()) if differ else 0.0
    if share > 0.01:
        raise WrongResultError(f"{name}: {share:.2%} of the reads are of other slots than in eager")
    compare(name, ("loss",), [output.loss], [expected.loss], tolerance)
    flat = [torch.cat([x.flatten() for x in gradients.values()]) for gradients in (found, wanted)]
    error = float((flat[0] - flat[1]).norm() / flat[1].norm())
    limit = tolerance if share == 0 else TIED
    if not error <= limit:
        raise WrongResultError(f"{name}: gradients are off by {error:.2g} of their length; expected {limit} at most")
    return {"error": error, "other_slots": share}


def _gradients(call: Any, model: FwPKMForCausalLM, ids: Tensor) -> tuple[FwPKMOutput, dict[str, Tensor]]:
    output = step(call, model, ids)
    return output, {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
