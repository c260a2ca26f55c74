"""How tests draw: hypothesis draws sizes, options and a seed; a seeded generator builds the tensors, so that cases
replay.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import example
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)


class Draw:
    """Random tensors from one seed, float64 unless told."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def strided(x: Tensor) -> Tensor:
    """The same numbers in a tensor that is contiguous in no dimension, with NaN (or a huge integer) between them."""
    filler = torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    padded = torch.full((*(2 * s for s in x.shape),), filler, dtype=x.dtype)
    view = padded[(slice(None, None, 2),) * x.dim()]
    view.copy_(x)
    return view.detach()


Choices = Callable[[random.Random], Any] | Sequence[Any]


def choose(pick: random.Random, choices: Mapping[str, Choices]) -> dict[str, Any]:
    """One of each, drawn by itself."""
    return {name: values(pick) if callable(values) else pick.choice(values) for name, values in choices.items()}


def also(count: int, **choices: Choices) -> Callable[[Any], Any]:
    """Examples besides those of Hypothesis, which come in runs that are alike: of these every argument is drawn by
    itself, so that few of them meet many combinations. The same ones each time.
    """

    def decorate(test: Any) -> Any:
        for seed in range(count):
            test = example(**choose(random.Random(seed), choices))(test)
        return test

    return decorate


def any_seed(pick: random.Random) -> int:
    return pick.randrange(2**31)


def any_cuts(pick: random.Random) -> list[int]:
    return [pick.randint(1, 19) for _ in range(pick.randint(0, 4))]
