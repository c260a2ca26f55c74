"""Texts that tell things, and what is asked about them."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwpkm.data.associations import associations
from fwpkm.data.questions import PAIR_BYTES, pairs, secret_numbers
from tests.draws import seeds

FILLER = np.frombuffer(("def function(x):\n    return x + 1\n\n" * 200).encode(), dtype=np.uint8)
FACT = re.compile(r"The secret number for ID-([a-z0-9]{4}) is (\d{6})\.\n")


@given(seeds, st.integers(0, 8), st.integers(400, 3000))
def test_secret_numbers(seed, count, length):
    made = secret_numbers(FILLER, np.random.default_rng(seed), length, count)
    text = made.text.decode()
    assert len(text) == length
    stated = {m[1]: m for m in FACT.finditer(text)}
    assert len(stated) == len(made.questions) == count
    assert FACT.sub("", text) in bytes(FILLER).decode()
    for prompt, answer, place in made.questions:
        name = re.fullmatch(r"\nThe secret number for ID-([a-z0-9]{4}) is ", prompt.decode())[1]
        assert (answer.decode(), place) == (stated.pop(name)[2], stated.get(name, FACT.search(text, place)).start())


@given(seeds, st.integers(0, 5), st.integers(0, 200))
def test_pairs(seed, count, more):
    length = count * PAIR_BYTES + more
    made = pairs(np.random.default_rng(seed), length, count)
    assert length - PAIR_BYTES < len(made.text) <= length
    stated = json.loads("{" + made.text.decode().rstrip(",\n") + "}")
    assert len(stated) == len(made.text) // PAIR_BYTES
    assert len({question.prompt for question in made.questions}) == count
    for prompt, answer, place in made.questions:
        key = re.fullmatch(r'\n"([a-z0-9]{8})": "', prompt.decode())[1]
        assert stated[key] == answer.decode()
        assert made.text[place:].startswith(prompt[1:] + answer)


@given(seeds, st.integers(1, 40), st.integers(20, 50))
def test_associations(seed, count, vocabulary):
    made = associations(np.random.default_rng(seed), count, vocabulary)
    triples = made.tokens.reshape(-1, 3)
    told, asked = triples[:count].tolist(), triples[count:].tolist()
    assert sorted(told) == sorted(asked)
    assert len({(a, b) for a, b, _ in told}) == count
    assert (triples[:, :2] < vocabulary // 2).all()
    assert (triples[:, 2] >= vocabulary // 2).all()
    assert made.tokens.max() < vocabulary
    assert made.tokens[made.answers].tolist() == [value for _, _, value in asked]


def test_associations_come_in_random_order():
    made = associations(np.random.default_rng(0), 100, 256)
    assert made.tokens[:300].tolist() != made.tokens[300:].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rng: pairs(rng, 50, 3), "length is 50; expected at least 72 bytes for 3 pairs"),
        (lambda rng: associations(rng, 17, 8), r"pairs is 17; expected in \[1, 16\], the keys of 8 tokens"),
        (lambda rng: associations(rng, 0, 8), r"pairs is 0; expected in \[1, 16\]"),
        (lambda rng: secret_numbers(FILLER, rng, 10**6, 3), "text is .* bytes long; expected more than"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make(np.random.default_rng(0))
