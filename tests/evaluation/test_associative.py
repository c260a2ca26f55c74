"""Associative recall against a forward without a cache, and of a model that looks the values up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fwpkm.data.associations import associations
from fwpkm.evaluation import associative
from fwpkm.evaluation.associative import associative_recall
from tests.draws import seeds
from tests.evaluation.tiny import model


@given(seeds, st.integers(1, 20), st.integers(1, 5), st.integers(3, 200))
def test_associative_recall(seed, pairs, sequences, call):
    """Of a model that says one of two values whatever it is asked."""
    net = model(seed)
    with torch.no_grad():
        net.lm_head.weight[:-2] /= 100
    row = associative_recall(net, pairs, sequences, seed, call=call)
    rng, right = np.random.default_rng((seed, pairs)), 0
    for _ in range(sequences):
        made = associations(rng, pairs, 24)
        with torch.no_grad():
            said = net(torch.from_numpy(made.tokens)[None]).logits[0].argmax(-1).numpy()
        right += (said[made.answers - 1] == made.tokens[made.answers]).sum()
    assert row["right"] == pytest.approx(right / (pairs * sequences), abs=1.5 / (pairs * sequences))
    assert (row["pairs"], row["length"], row["questions"]) == (pairs, 6 * pairs, pairs * sequences)
    assert row["chance"] == 1 / 12
    assert 0 <= row["right_lower95"] <= row["right"]


class LooksUp(nn.Module):
    """Says what followed the last two tokens when they stood there first."""

    def __init__(self, vocabulary):
        super().__init__()
        self.config, self.device, self.known = model(vocab_size=vocabulary).config, torch.device("cpu"), None

    def forward(self, tokens, cache, output_memories):
        if cache.tokens == 0:
            self.known = [[] for _ in tokens]
        cache.tokens += tokens.shape[1]
        logits = torch.zeros(*tokens.shape, self.config.vocab_size)
        for row, (known, new) in enumerate(zip(self.known, tokens.tolist(), strict=True)):
            for t, token in enumerate(new):
                known.append(token)
                keys = list(zip(known[:-2:3], known[1:-1:3], strict=False))
                if len(known) % 3 == 2 and tuple(known[-2:]) in keys:
                    logits[row, t, known[3 * keys.index(tuple(known[-2:])) + 2]] = 1
        return type("Result", (), {"logits": logits})()


@pytest.mark.parametrize("side_by_side", [1, 1 << 18])
def test_what_was_told_is_there_to_be_found(monkeypatch, side_by_side):
    monkeypatch.setattr(associative, "SIDE_BY_SIDE", side_by_side)
    row = associative_recall(LooksUp(40), 9, 3, vocabulary=31, call=20)
    assert row["right"] == 1
    assert row["chance"] == 1 / 16


def test_bad_sequences():
    with pytest.raises(ValueError, match="sequences is 0; expected a positive integer"):
        associative_recall(model(), 3, 0)
