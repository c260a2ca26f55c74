"""Texts that tell things, and questions about them that are asked apart from the text."""

from __future__ import annotations

import string
from typing import NamedTuple

from numpy.random import Generator

from fwpkm.checks import require
from fwpkm.data import needles
from fwpkm.data.text import Bytes

_PAIR = '"{key}": "{value}",\n'
_CHARACTERS = 8  # of a key, and of a value
_ALPHABET = list(string.ascii_lowercase + string.digits)
PAIR_BYTES = len(_PAIR.format(key="x" * _CHARACTERS, value="x" * _CHARACTERS))


class Question(NamedTuple):
    """What is asked about a text."""

    prompt: bytes  # begins a line, and ends where the answer begins
    answer: bytes
    place: int  # the byte of the text at which its statement begins


class Haystack(NamedTuple):
    """A text, and questions about it."""

    text: bytes
    questions: list[Question]


def secret_numbers(filler: Bytes, rng: Generator, length: int, count: int) -> Haystack:
    """The paper's needles: ``count`` sentences "The secret number for ID-xxxx is dddddd." in ``length`` bytes.

    They are those of :func:`fwpkm.data.needles.document`, without its questions.
    """
    made = needles.document(filler, rng, length + count * needles.SENTENCE_BYTES, count)
    questions = []
    for place, digits in zip(made.needles, made.answers, strict=True):
        prompt = bytes(made.tokens[place : place + needles.ANSWER.start])
        questions.append(Question(b"\n" + prompt, bytes(made.tokens[digits]), int(place)))
    return Haystack(bytes(made.tokens[:length]), questions)


def pairs(rng: Generator, length: int, count: int) -> Haystack:
    """Lines ``"key": "value",`` of random letters and digits, as many as fit ``length`` bytes; ``count`` are asked for.

    Raises:
        ValueError: if there are fewer than ``count``.
    """
    lines = length // PAIR_BYTES
    require(lines >= count, "length", length, "at least {} bytes for {} pairs", count * PAIR_BYTES, count)
    drawn: dict[str, str] = {}  # a key stands once
    while len(drawn) < lines:
        key, value = ("".join(rng.choice(_ALPHABET, _CHARACTERS)) for _ in range(2))
        drawn.setdefault(key, value)
    stated = list(drawn.items())
    text = "".join(_PAIR.format(key=key, value=value) for key, value in stated)
    questions = []
    for i in rng.choice(lines, count, replace=False):
        key, value = stated[i]
        prompt = "\n" + _PAIR.format(key=key, value=value)[: -len(value) - len('",\n')]
        questions.append(Question(prompt.encode(), value.encode(), int(i) * PAIR_BYTES))
    return Haystack(text.encode(), questions)
