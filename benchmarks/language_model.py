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

DRAWS = 10


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
    output: FwPKMOutput = call(input_ids=ids, labels=ids)
    assert output.loss is not None
    output.loss.backward()
    return output


def checked_tokens(name: str, call: Any, model: FwPKMForCausalLM, size: Size, tolerance: float) -> tuple[Tensor, float]:
    """Tokens ``[B, T]`` for which ``call``, the compiled model, has eager's loss and gradients, and the largest error.

    Two slots with nearly the same score may change places when a query is rounded otherwise, and everything that is
    read where they wrote then differs. So tokens are drawn again until the slots of both are the same.

    Raises:
        WrongResultError: if a loss or gradient differs, or the slots do in every draw.
    """
    for seed in range(DRAWS):
        ids = draw(size, seed)
        (expected, wanted), (output, found) = (_gradients(either, model, ids) for either in (model, call))
        if all(torch.equal(x, y) for x, y in zip(output.slots or (), expected.slots or (), strict=True)):
            labels = ("loss", *wanted)
            if found.keys() != wanted.keys():
                raise WrongResultError(f"{name}: other parameters have gradients than in eager")
            results = [output.loss, *found.values()], [expected.loss, *wanted.values()]
            return ids, max(compare(name, labels, *results, tolerance).values())
    raise WrongResultError(f"{name}: slots are not those of eager in any of {DRAWS} draws")


def _gradients(call: Any, model: FwPKMForCausalLM, ids: Tensor) -> tuple[FwPKMOutput, dict[str, Tensor]]:
    output = step(call, model, ids)
    return output, {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
