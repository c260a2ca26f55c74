"""The paper's needles in real text: facts scattered through a document, and questions about them at its end."""

from __future__ import annotations

import string
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fwpkm.checks import require
from fwpkm.data.text import Bytes

DIGITS = 6
_SENTENCE = "The secret number for ID-{name} is {number}.\n"
_ALPHABET = list(string.ascii_lowercase + string.digits)
SENTENCE_BYTES = len(_SENTENCE.format(name="a1b2", number="123456"))
ANSWER = slice(SENTENCE_BYTES - 2 - DIGITS, SENTENCE_BYTES - 2)  # where a sentence has its digits


class Document(NamedTuple):
    """A text with needles in it and a question about each at the end, byte by byte."""

    tokens: Bytes  # [T]
    answers: NDArray[np.int64]  # [Q, 6] where the digits of the answers stand
    needles: NDArray[np.int64]  # [Q] where the sentence with the answer starts
    names: list[str]  # [Q] what is asked for
    stale: list[str | None]  # [Q] the number that was stated first, where it was overwritten


def document(text: Bytes, rng: Generator, length: int, needles: int, overwritten: int = 0) -> Document:
    """Build a document of ``length`` bytes from a random piece of ``text``.

    Args:
        text: where the piece comes from.
        rng: draws everything, in the same order for the same arguments.
        length: of the whole document in bytes, questions included.
        needles: facts, each with a fresh name and number, on lines of their own at uniform depths.
        overwritten: how many of them were stated before with another number; the latest is asked for.

    Raises:
        ValueError: if the sentences do not fit into ``length``, or the text is shorter than the piece.
    """
    sentences = 2 * needles + overwritten
    piece = length - sentences * SENTENCE_BYTES
    least = sentences * SENTENCE_BYTES
    require(piece >= 0, "length", length, "at least {} bytes for {} needles and their questions", least, needles)
    require(text.size > piece, "text", f"{text.size} bytes long", "more than {} bytes", piece)
    require(0 <= overwritten <= needles, "overwritten", overwritten, "in [0, {}]", needles)
    start = int(rng.integers(0, text.size - piece))
    filler = text[start : start + piece]

    names = _names(rng, needles)
    numbers = ["".join(map(str, rng.integers(0, 10, DIGITS))) for _ in range(needles)]
    order = rng.permutation(needles)
    facts = [_encode(names[i], numbers[i]) for i in order]
    depths = np.sort(rng.random(needles))
    stale: list[str | None] = [None] * needles
    for place in rng.choice(needles, overwritten, replace=False):  # an older fact, before the one that counts
        older = "".join(map(str, rng.integers(0, 10, DIGITS)))
        stale[place] = older
        facts.append(_encode(names[order[place]], older))
        depths = np.append(depths, depths[place] * rng.random())
    cuts = _line_starts(filler, depths)
    is_newer = np.arange(len(cuts)) < needles
    position = np.lexsort((is_newer, cuts))  # at the same cut the older fact comes first
    starts = np.empty(len(cuts), dtype=np.int64)
    parts, last = [], 0
    for rank, i in enumerate(position):
        parts += [filler[last : cuts[i]], facts[i]]
        starts[i] = cuts[i] + rank * SENTENCE_BYTES
        last = cuts[i]
    parts.append(filler[last:])

    asked = rng.permutation(needles)
    parts += [facts[i] for i in asked]
    first = length - needles * SENTENCE_BYTES + np.arange(needles) * SENTENCE_BYTES
    answers = first[:, None] + np.arange(ANSWER.start, ANSWER.stop)
    asked_names, asked_stale = [names[order[i]] for i in asked], [stale[i] for i in asked]
    return Document(np.concatenate(parts), answers, starts[asked], asked_names, asked_stale)


def batch(text: Bytes, rng: Generator, size: int, length: int, needles: int) -> tuple[Bytes, NDArray[np.bool_]]:
    """Training documents ``[size, length]``, some facts overwritten, and where their answers are.

    A document has two thirds of ``needles`` facts to all of them.
    """
    tokens, is_answer = np.empty((size, length), np.uint8), np.zeros((size, length), bool)
    for row in range(size):
        count = int(rng.integers((2 * needles + 2) // 3, needles + 1))
        made = document(text, rng, length, count, overwritten=int(rng.integers(0, count // 3 + 1)))
        tokens[row] = made.tokens
        is_answer[row, made.answers.flatten()] = True
    return tokens, is_answer


def _names(rng: Generator, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice(_ALPHABET, 4))
        if name not in names:
            names.append(name)
    return names


def _encode(name: str, number: str) -> Bytes:
    return np.frombuffer(_SENTENCE.format(name=name, number=number).encode(), dtype=np.uint8)


def _line_starts(text: Bytes, depths: NDArray[np.float64]) -> NDArray[np.int64]:
    """The beginning of the line that each depth in [0, 1) falls into."""
    starts = np.concatenate(([0], np.flatnonzero(text == ord("\n")) + 1))
    return starts[np.searchsorted(starts, (depths * text.size).astype(np.int64), side="right") - 1]
