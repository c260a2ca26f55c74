"""How the report writes numbers."""

from __future__ import annotations

from collections.abc import Mapping

MISSING = "–"


def length_label(length: int) -> str:
    """1024 is 1K, 1048576 is 1M; what is not a round number of those keeps three digits."""
    if length >= 2**20:
        return f"{length / 2**20:.3g}M"
    return f"{length / 2**10:.3g}K" if length >= 2**10 else str(length)


def percent(share: float | None) -> str:
    """A share to a tenth of a percent; only 0 and 1 themselves are written 0% and 100%."""
    if share is None:
        return MISSING
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{min(max(100 * share, 0.1), 99.9):.1f}%"


def bounded(entry: Mapping[str, float] | None) -> str:
    """Exact match with its 95% lower bound."""
    return MISSING if entry is None else f"{percent(entry['exact'])} (≥ {percent(entry['exact_lower95'])})"


def count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def decimal(number: float | None) -> str:
    """Three significant digits, or all of those before the point."""
    if number is None:
        return MISSING
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
