"""Documents with needles, and the texts they are hidden in."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwpkm.data import needles
from fwpkm.data.text import load_split, standard_library, text_files
from tests.draws import seeds

TEXT = np.frombuffer(("def function(x):\n    return x + 1\n\n" * 200).encode(), dtype=np.uint8)
FACT = re.compile(r"The secret number for ID-([a-z0-9]{4}) is (\d{6})\.\n")


@given(seed=seeds, count=st.integers(0, 8), length=st.integers(1000, 4000), data=st.data())
def test_document(seed, count, length, data):
    """As long as asked; every fact is stated, then asked for; the latest number is the answer."""
    overwritten = data.draw(st.integers(0, count))
    made = needles.document(TEXT, np.random.default_rng(seed), length, count, overwritten)
    text = bytes(made.tokens).decode()
    assert len(text) == length
    stated = list(FACT.finditer(text))
    assert len(stated) == 2 * count + overwritten
    questions = {m[1]: m for m in stated[-count:]} if count else {}
    facts = {m[1]: m for m in stated[: count + overwritten]}  # of several statements the latest stays
    assert list(questions) == made.names
    for q, name in enumerate(made.names):
        answer = bytes(made.tokens[made.answers[q]]).decode()
        assert answer == questions[name][2] == facts[name][2]
        assert facts[name].start() == made.needles[q]
        statements = [m[2] for m in stated[: count + overwritten] if m[1] == name]
        assert statements == ([made.stale[q]] if made.stale[q] else []) + [answer]
    assert sum(number is not None for number in made.stale) == overwritten
    filler = FACT.sub("", text)
    assert filler in bytes(TEXT).decode()


def test_facts_stand_on_lines_of_their_own_at_uniform_depths():
    rng = np.random.default_rng(0)
    depths = []
    for _ in range(50):
        made = needles.document(TEXT, rng, 4000, 8)
        text = bytes(made.tokens)
        assert all(start == 0 or text[start - 1 : start] == b"\n" for start in made.needles)
        depths += list(made.needles / (4000 - 8 * needles.SENTENCE_BYTES))
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 70  # of 100 expected


def test_batches_replay_and_mark_answers():
    first, again = (needles.batch(TEXT, np.random.default_rng(3), 4, 1024, 5) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    tokens, answers = first
    assert tokens.shape == answers.shape == (4, 1024)
    for row in range(4):
        marked = bytes(tokens[row][answers[row]]).decode()
        stated = FACT.findall(bytes(tokens[row]).decode())
        asked = len(marked) // needles.DIGITS
        assert marked == "".join(number for _, number in stated[-asked:])


@pytest.mark.parametrize(
    ("length", "count", "overwritten", "message"),
    [
        (100, 3, 0, "length is 100; expected at least .* bytes for 3 needles and their questions"),
        (10**6, 3, 0, "text is .* bytes long; expected more than"),
        (2000, 3, 4, r"overwritten is 4; expected in \[0, 3\]"),
    ],
)
def test_bad_document(length, count, overwritten, message):
    with pytest.raises(ValueError, match=message):
        needles.document(TEXT, np.random.default_rng(0), length, count, overwritten)


def test_the_standard_library_is_split_by_files():
    files = standard_library()
    assert len(files) > 300
    assert not any("site-packages" in path.parts for path in files)
    train, held_out = load_split(files[:40])
    assert 0 < held_out.size < train.size
    again = load_split(list(reversed(files[:40])))
    assert np.array_equal(train, again[0])
    assert np.array_equal(held_out, again[1])


def test_bad_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a text file or a folder"):
        text_files(tmp_path / "nowhere")
    assert text_files(tmp_path) == []
    with pytest.raises(ValueError, match="text is empty; expected text in the 0 documents"):
        load_split([])
    (tmp_path / "one.txt").write_text("hello")
    with pytest.raises(ValueError, match="training text is empty; expected text in the 1 documents"):
        load_split(text_files(tmp_path))
