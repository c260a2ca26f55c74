"""Questions to read: what was asked, what the models said, and how the memory wrote the text around the answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from fwpkm.report.labels import MISSING, count, length_label
from fwpkm.report.markup import Markup, element
from fwpkm.report.results import MODELS, Entry, Results


def questions_to_read(results: Results) -> Markup:
    """The section of the page with the examples; nothing where there are none."""
    if not results["examples"]:
        return Markup()
    return element(
        "section",
        element("h2", "Questions to read"),
        element(
            "p",
            "Around each number stands the text in which it was told. The stronger the colour behind a character, the "
            "more of it was written to the memory; point at it to see its gate.",
        ),
        element(
            "div",
            element("span", "gate 0: nothing"),
            element("span", class_="ramp", role="img", aria_label="from no colour to strong colour"),
            element("span", "gate 1: all of it"),
            class_="legend",
        ),
        element("div", *(_question(example) for example in results["examples"]), class_="asked"),
    )


def _question(example: Entry) -> Markup:
    answers = [element("div", element("dt", "The number was"), element("dd", example["expected"], class_="digits"))]
    for model, name in MODELS.items():
        right = example[model] == example["expected"]
        verdict = element("span", "✓ right" if right else "✗ wrong", class_="right" if right else "wrong")
        answer = element("span", example[model], class_="digits")
        answers.append(element("div", element("dt", f"The model {name} said"), element("dd", answer, " ", verdict)))
    whole = example["before"] + example["needle"] + example["after"]
    gates = gate_of_characters(whole, example["gates"])
    start, stop = len(example["before"]), len(example["before"]) + len(example["needle"])
    shown = [_by_gate(whole[part], gates[part]) for part in (slice(start), slice(start, stop), slice(stop, None))]
    inside, around = gates[start:stop], gates[:start] + gates[stop:]
    place = (
        f"Told {count(example['distance'])} bytes before the question, at {example['depth']:.0%} of a text of "
        f"{length_label(example['length'])} bytes. "
    )
    if None in gates:
        place += "The gates of this text are not known."
    else:
        place += f"Mean gate in the sentence {_mean(inside)}, around it {_mean(around)}."
    return element(
        "article",
        element("h3", element("code", example["question"], " …")),
        element("dl", *answers),
        element("p", place, class_="faint"),
        element("pre", shown[0], element("mark", shown[1]), shown[2]),
        class_="card",
    )


def gate_of_characters(content: str, gates: Sequence[float]) -> list[float | None]:
    """The gate of every character: the mean over its bytes, or None for all where the gates fit no reading of the text.

    A text is UTF-8 whose undecodable bytes became surrogates or U+FFFD, or else a byte a character.
    """
    utf8 = [len(character.encode(errors="replace")) for character in content]
    lossy = [1 if character == "\ufffd" else size for character, size in zip(content, utf8, strict=True)]
    for sizes in (utf8, lossy, [1] * len(content)):
        if sum(sizes) == len(gates):
            remaining = iter(gates)
            return [fmean(next(remaining) for _ in range(size)) for size in sizes]
    return [None] * len(content)


def _by_gate(content: str, gates: Sequence[float | None]) -> Markup:
    """Runs of characters with the same gate, coloured by it."""
    spans = []
    labelled = zip(content, (None if gate is None else f"{gate:.2f}" for gate in gates), strict=True)
    for gate, run in groupby(labelled, key=lambda pair: pair[1]):
        style, title = (None, None) if gate is None else (f"--gate: {gate}", f"gate {gate}")
        spans.append(element("span", "".join(character for character, _ in run), style=style, title=title))
    return Markup("".join(spans))


def _mean(gates: Sequence[float | None]) -> str:
    return f"{fmean(gate for gate in gates if gate is not None):.2f}" if gates else MISSING
