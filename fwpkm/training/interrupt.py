"""Stopping between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """``signal``: the SIGINT or SIGTERM that has asked to stop, or None."""

    signal: int | None = None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note a first Ctrl-C or SIGTERM instead of dying of it; a second one acts as always.

    Outside the main thread, which alone can handle signals, nothing changes.
    """
    asked = Interrupt()
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
