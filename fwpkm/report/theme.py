"""The colours of pictures and page, on light and on dark ground."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """One ground and what stands on it.

    The two models wear a blue and an orange of Okabe and Ito's palette, which readers with any colour vision tell
    apart. The scale is one hue whose lightness changes steadily away from the ground.
    """

    ground: str
    card: str  # under pictures and tables
    ink: str
    faint: str  # ink of what matters less
    rule: str
    memory: str
    control: str
    right: str
    wrong: str
    gap: str  # cells without a question
    scale: tuple[str, ...]  # share 0 to share 1

    def of(self, model: str) -> str:
        return self.memory if model == "memory" else self.control


LIGHT = Theme(
    ground="#f4f6f8",
    card="#ffffff",
    ink="#1b2430",
    faint="#566270",
    rule="#d8dee6",
    memory="#0072b2",
    control="#b34700",
    right="#1a7f4b",
    wrong="#b3261e",
    gap="#e3e5e8",
    scale=("#f1f5fa", "#c3daee", "#74aedb", "#2675b8", "#08386f"),
)
DARK = Theme(
    ground="#0f1318",
    card="#171c23",
    ink="#e7ebf0",
    faint="#9ca8b5",
    rule="#303843",
    memory="#56b4e9",
    control="#e69f00",
    right="#5fcf95",
    wrong="#ff8a80",
    gap="#343a42",
    scale=("#1e2833", "#163f61", "#1f6ba3", "#58aee0", "#d3edfc"),
)
