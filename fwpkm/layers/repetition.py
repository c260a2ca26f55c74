"""Forwards that an activation checkpoint runs once more: which they are, and what of a ``shared`` memory they read."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import FrameType
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes

from fwpkm.memory import FastWeights, MemoryState
from fwpkm.memory.changes import Changes

if TYPE_CHECKING:
    from fwpkm.layers.fwpkm import FwPKM

FIRST, AGAIN = "first", "again"  # times that a checkpoint runs a forward
_ENGINE = torch.autograd.graph.__file__
_TIMES = {"checkpoint": FIRST, "forward": FIRST, "recompute_fn": AGAIN, "backward": AGAIN}  # by functions of torch's


def under_checkpoint() -> str | None:
    """Whether an activation checkpoint around the caller runs it, for the first time or again; None if there is none.

    The stack says it: a forward in a backward, of a hook say, is no repetition, and one in a checkpoint that is itself
    repeated is. Beyond a call of the autograd engine nothing counts.
    """
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file == checkpoint.__file__:
            time = _TIMES.get(name)
            if time == AGAIN:
                return AGAIN
            found = found or time
        elif file == _ENGINE and name == "_engine_run_backward":
            break
        frame = frame.f_back
    return found


def is_repeated() -> bool:
    """Whether an activation checkpoint around the caller runs it once more, in a backward."""
    return not torch.compiler.is_compiling() and under_checkpoint() == AGAIN


class Repetitions:
    """What a ``shared`` memory knows of checkpoints that lie around a whole forward, which keep no start of it.

    They are right while nothing is committed between a forward and its repetition.
    """

    def __init__(self) -> None:
        self._expected = self._outdated = False

    def begin(self, time: str | None) -> bool:
        """A forward begins, under a checkpoint for the given time; whether it repeats one that read other weights."""
        outdated = time == AGAIN and self._outdated
        if time is not None:
            self._expected = time == FIRST
        if time == AGAIN:
            self._outdated = False
        return outdated

    def overwritten(self) -> None:
        """The memory has been committed to."""
        self._outdated = self._expected


class SharedStart:
    """What one training forward reads of a ``shared`` memory: the fast weights as they were when it began.

    Handed to the memory as its state. A checkpoint keeps what a block was called with, so a repetition comes with the
    same object, and finds the same weights although a later forward may have committed changes since: as long as
    somebody holds a start, commits leave with it what they overwrite.
    """

    def __init__(self, memory: FwPKM) -> None:
        self.memory = memory
        self._repeated = self._outdated = False
        self._overwritten: list[tuple[Tensor, Tensor, Tensor]] = []  # slots [R], their values [R, Dv], all keys
        if not torch.compiler.is_compiling():
            time = under_checkpoint()
            self._outdated = memory.repetitions.begin(time)
            self._repeated = time == AGAIN
            _held.add(self)

    def weights(self) -> FastWeights:
        """The fast weights that the forward starts from.

        Raises:
            RuntimeError: for a repetition, by a checkpoint around the whole forward, that comes after a commit.
        """
        if self._outdated:
            raise RuntimeError(
                "an activation checkpoint repeats a training forward whose 'shared' memory has been committed to since:"
                " call backward() before the next forward, or checkpoint blocks and not the whole model"
                " (model.checkpoint_blocks())"
            )
        keys, values = self.memory.keys, self.memory.values
        learned = isinstance(keys, torch.nn.Parameter)
        if not learned and not torch.compiler.is_compiling():
            keys = keys.clone()  # a commit before the backward moves them
        if self._overwritten:
            # Selective checkpoints refuse calls of operators that the first time did not make: out of their sight.
            with nullcontext() if torch.compiler.is_compiling() else _disable_current_modes():
                values = values.detach().clone()
                for slots, old, _ in reversed(self._overwritten):
                    values[slots] = old
            keys = keys if learned else self._overwritten[0][2]
        return FastWeights(keys, values)

    def leave(self, state: MemoryState) -> None:
        """Leave what the forward has stored ``pending``; a repetition leaves nothing."""
        if not self._repeated:
            self.memory.pending = state.changes()


_held: WeakSet[SharedStart] = WeakSet()


def before_commit(memory: FwPKM, changes: Changes) -> None:
    """Leave with the forwards that may be repeated what ``changes`` will overwrite."""
    if torch.compiler.is_compiling() or not any(x.shape[0] for x in changes.tensors()):
        return
    memory.repetitions.overwritten()
    starts = [start for start in _held if start.memory is memory]
    if not starts:
        return
    values = memory.values.detach()
    if changes.values is not None or changes.writes is None:
        slots = torch.arange(values.shape[0], device=values.device)
    else:
        slots = changes.writes[0].to(values.device).unique()
    overwritten = slots, values[slots], memory.keys.detach().clone()
    for start in starts:
        start._overwritten.append(overwritten)
