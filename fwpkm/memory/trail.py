"""What was read lately: enough to take back the last tokens, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require
from fwpkm.memory.appendable import normal

REACH = 128  # tokens that can be taken back: more than transformers drafts at once unless it is told so
_SPACING = REACH // 2  # tokens between two states that are kept


class Step(NamedTuple):
    """Tokens that were read at once."""

    before: Any  # the state that read them, or None where it is not kept
    tensors: tuple[Tensor | None, ...]  # [B, T, ...] each, what it read
    flushed: bool = False  # right after

    @property
    def length(self) -> int:
        return next(x.shape[1] for x in self.tensors if x is not None)


class Trail(NamedTuple):
    """The steps that led to a state, from ``REACH`` tokens or more before it (or from its beginning); immutable.

    To take tokens back is to read the others once more, from the last of the states that are kept: nothing is copied
    while tokens come, and whatever a state is made of, it is the one that never saw those tokens.

    Attributes:
        read: ``read(state, tensors)``, the state after reading; a function of a module, so that a trail can be copied.
        steps: in their order.
    """

    read: Callable[[Any, tuple[Tensor | None, ...]], Any]
    steps: tuple[Step, ...] = ()

    @property
    def reach(self) -> int:
        """How many tokens can be taken back."""
        return min(REACH, sum(step.length for step in self.steps))

    def extend(self, before: Any, tensors: tuple[Tensor | None, ...]) -> Trail:
        """The trail after ``before``, a state at its end, has read ``tensors``."""
        steps = (*self.steps, Step(before, tensors))
        behind, bounds = 0, []  # tokens from each state that is kept
        for i in range(len(steps) - 1, -1, -1):
            behind += steps[i].length
            if steps[i].before is not None:
                bounds.append((i, behind))
        latest, length = bounds[0]
        if len(bounds) > 1 and bounds[1][1] - length < _SPACING:
            steps = (*steps[:latest], steps[latest]._replace(before=None), *steps[latest + 1 :])
            bounds.pop(0)
        first = next((i for i, behind in bounds if behind >= REACH), 0)
        return Trail(self.read, steps[first:])

    def follow(self, state: Any, tensors: tuple[Tensor | None, ...]) -> tuple[Any, Trail]:
        """The state after reading ``tensors``, and the trail to it."""
        trail = self
        for part in parts(tensors):
            trail, state = trail.extend(state, part), self.read(state, part)
        return state, trail

    def flush(self) -> Trail:
        """The trail after the state at its end was flushed."""
        *earlier, step = self.steps
        return Trail(self.read, (*earlier, step._replace(flushed=True)))

    def back(self, tokens: int) -> tuple[Any, Trail]:
        """The state ``tokens`` ago, and its trail. A flush between the last token that stays and the next one stays.

        Raises:
            ValueError: if so many cannot be taken back.
        """
        require_reach(tokens, self.reach)
        steps = list(self.steps)
        left = tokens
        while left:  # drop what is taken back
            step = steps.pop()
            if step.length > left:
                kept = tuple(None if x is None else x[:, : step.length - left] for x in step.tensors)
                steps.append(step._replace(tensors=kept, flushed=False))
                left = 0
            else:
                left -= step.length
                if not left and step.before is not None:
                    return step.before, Trail(self.read, tuple(steps))
        start = max(i for i, step in enumerate(steps) if step.before is not None)
        state = steps[start].before
        for joined in _joined(steps[start:]):
            state = self.read(state, tuple(None if x is None else normal(x) for x in joined.tensors))
            state = state.flush() if joined.flushed else state
        return state, Trail(self.read, tuple(steps))

    def map(self, state: Callable[[Any], Any], tensor: Callable[[Tensor], Tensor]) -> Trail:
        """The same of other rows: ``state`` of each state that is kept, ``tensor`` of each tensor."""
        return Trail(
            self.read,
            tuple(
                Step(
                    None if step.before is None else state(step.before),
                    tuple(None if x is None else tensor(x) for x in step.tensors),
                    step.flushed,
                )
                for step in self.steps
            ),
        )


def require_reach(tokens: int, reach: int) -> None:
    """Refuse to take back more than ``reach`` tokens."""
    require(
        0 <= tokens <= reach,
        "tokens",
        tokens,
        "0 to {}: the last {} tokens can be taken back, as far as they were read with this state, outside training and"
        " compiled graphs",
        reach,
        REACH,
    )


def parts(tensors: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
    """A call's tensors ``[B, T, ...]`` as a trail takes them: its last ``REACH`` tokens apart, and a copy.

    So a trail need not begin before those, and keeps nothing of the others once more have come.
    """
    cut = next(x.shape[1] for x in tensors if x is not None) - REACH
    if cut <= 0:
        return [tensors]
    return [
        tuple(None if x is None else x[:, :cut] for x in tensors),
        tuple(None if x is None else x[:, cut:].clone() for x in tensors),
    ]


def leaves_trail(training: bool) -> bool:
    """Whether what is read now may have to be taken back: nobody does in training, and no graph holds a history."""
    return not training and not torch.compiler.is_compiling()


def _joined(steps: list[Step]) -> Iterator[Step]:
    """The same with what was read one after the other as if it had been read at once."""
    joined = steps[0]
    for step in steps[1:]:
        alike = all((x is None) == (y is None) for x, y in zip(joined.tensors, step.tensors, strict=True))
        if joined.flushed or not alike:
            yield joined
            joined = step
        else:
            pairs = zip(joined.tensors, step.tensors, strict=True)
            tensors = tuple(None if x is None or y is None else torch.cat((x, y), 1) for x, y in pairs)
            joined = step._replace(tensors=tensors)
    yield joined
