"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """Tells ``progress`` the sum of the numbers that it is called with."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(what, done, total)

    return count
