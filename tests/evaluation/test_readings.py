"""Questions after several readings: the session's reading as an independent account, and a model that knows it all."""

import numpy as np
import pytest
import torch
from torch import nn

from fwpkm.data.codec import Codec
from fwpkm.data.questions import Haystack, Question, pairs, secret_numbers
from fwpkm.evaluation.readings import ask_after_readings
from fwpkm.session import Session
from tests.evaluation.test_questions import FILLER
from tests.evaluation.tiny import model, tokens

NEAR = {
    "layer_types": ["sliding_attention"] * 2,
    "fwpkm_chunk_size": 64,
}  # an answer sees none of the text


def ascii_model(seed):
    """Every likeliest byte is ASCII, so that a session gives all of its answers back."""
    net = model(seed, vocab_size=256, **NEAR)
    with torch.no_grad():
        net.lm_head.weight[128:] = net.lm_head.weight[:128] / 2
    return net


def test_readings_are_those_of_a_session():
    """What a session says after so many passes is the right answer after as many readings, and not after others."""
    others = []
    for seed in range(3):
        net = ascii_model(seed)
        session, text = Session(net), bytes(tokens(seed, 150, high=128))
        prompts = [bytes(tokens(seed + i, 40, high=128)) for i in range(1, 4)]
        told = []
        for _ in range(3):
            session.read(text)
            told.append([session.ask(prompt, 6).encode() for prompt in prompts])
        for passes, answers in enumerate(told, start=1):
            assert {len(answer) for answer in answers} == {6}
            haystack = Haystack(text, [Question(p, a, 0) for p, a in zip(prompts, answers, strict=True)])
            rows = ask_after_readings(net, [haystack], 3, call=41)
            assert [row["readings"] for row in rows] == [1, 2, 3]
            assert rows[passes - 1]["exact"] == rows[passes - 1]["tokens_right"] == 1
            others += [row["exact"] for row in rows if row["readings"] != passes]
    assert np.mean(others) < 0.9


def test_a_question_leaves_nothing_behind():
    """Each is answered as if it were the only one, in models that attend to everything and to little."""
    for kinds in (["full_attention"] * 2, ["sliding_attention", "linear_attention"]):
        net = model(5, vocab_size=256, layer_types=kinds, **LINEAR)
        text = bytes(tokens(5, 90))
        asked = [Question(bytes(tokens(i, 5)), bytes(tokens(i + 50, 3)), 0) for i in range(6)]
        together = ask_after_readings(net, [Haystack(text, asked)], 2)
        alone = [ask_after_readings(net, [Haystack(text, [question])], 2) for question in asked]
        for i in range(2):
            assert together[i]["tokens_right"] == pytest.approx(np.mean([rows[i]["tokens_right"] for rows in alone]))
        reversed_order = ask_after_readings(net, [Haystack(text, asked[::-1])], 2)
        assert [r["tokens_right"] for r in reversed_order] == [r["tokens_right"] for r in together]


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


class Knows(nn.Module):
    """Says the true next token of every question, but for some answers wrongly from a token on."""

    def __init__(self, codec, haystacks, wrong):
        super().__init__()
        self.config, self.device = model(vocab_size=300).config, torch.device("cpu")
        asked = [question for haystack in haystacks for question in haystack.questions]
        self.whole = [codec.encode(q.prompt + q.answer).astype(int).tolist() for q in asked]
        self.wrong, self.read_so_far = wrong, 0

    def read(self, tokens, cache):
        self.read_so_far += tokens.numel()

    def forward(self, tokens, cache):
        given = tokens[0].tolist()
        which = next(i for i, whole in enumerate(self.whole) if whole[:-1] == given)
        said = list(self.whole[which][1:])
        if which in self.wrong:
            said[-1] = (said[-1] + 1) % 300
        logits = torch.zeros(1, len(said), 300)
        logits[0, torch.arange(len(said)), said] = 1
        return type("Result", (), {"logits": logits})()


@pytest.mark.parametrize("kind", ["bytes", "tokens"])
def test_an_answer_is_right_if_all_its_tokens_are(tokenizer, kind):
    codec = Codec() if kind == "bytes" else tokenizer
    rng = np.random.default_rng(3)
    haystacks = [secret_numbers(FILLER, rng, 900, 4), pairs(rng, 900, 4), secret_numbers(FILLER, rng, 900, 2)]
    net, seen = Knows(codec, haystacks, wrong={1, 6, 7}), []
    first, second = ask_after_readings(net, haystacks, 2, codec, call=100, on_tokens=seen.append)
    size = sum(codec.encode(haystack.text).size for haystack in haystacks)
    assert sum(seen) == net.read_so_far == 2 * size
    for row in (first, second):
        assert (row["texts"], row["questions"]) == (3, 10)
        assert row["exact"] == pytest.approx(7 / 10)
        assert 0.7 < row["tokens_right"] < 1
        assert sum(bin["questions"] for bin in row["depths"]) == 10
        shares = [bin["questions"] * bin["exact"] for bin in row["depths"] if bin["questions"]]
        assert sum(shares) == pytest.approx(7)
    if kind == "bytes":
        assert first["tokens_right"] == 1 - 3 / (6 * 6 + 4 * 8)


def test_no_readings():
    with pytest.raises(ValueError, match="readings is 0; expected a positive integer"):
        ask_after_readings(model(), [], 0)
