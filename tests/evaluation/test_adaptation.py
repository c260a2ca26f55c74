"""A, B, A: against forwards without a cache."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fwpkm.evaluation.adaptation import adaptation
from tests.draws import seeds
from tests.evaluation.test_perplexity import whole
from tests.evaluation.tiny import VOCABULARY, model, tokens


@given(seeds, st.integers(1, 3), st.integers(3, 30), st.data())
def test_adaptation(seed, rows, length, data):
    piece = data.draw(st.integers(1, length - 2))
    net, a, b = model(seed), tokens(seed, 100), tokens(seed + 1, 100, high=9)
    seen = []
    have = adaptation(net, a, b, length, rows, piece, call=data.draw(st.integers(1, 50)), on_tokens=seen.append)
    first, other = (torch.from_numpy(x[: rows * length].astype("int64")).view(rows, length) for x in (a, b))
    aba, aa = whole(net, torch.cat((first, other, first), 1)), whole(net, torch.cat((first, first), 1))
    at_first = aba[:, piece : length - 1].mean().item()
    again, after = (x[:, piece + 1 - length :].mean().item() for x in (aa, aba))
    assert [have["first"], have["again"], have["after"]] == pytest.approx([at_first, again, after], abs=2e-4)
    if at_first - again > 0.1:
        assert have["kept"] == pytest.approx((at_first - after) / (at_first - again), abs=0.02)
    covered = [p for point in have["curve"] for p in range(point["from"], point["to"])]
    assert covered == [p for p in range(3 * length) if p % length]
    for point in have["curve"]:
        assert point["text"] == "ABA"[point["from"] // length]
        assert point["loss"] == pytest.approx(aba[:, point["from"] - 1 : point["to"] - 1].mean().item(), abs=2e-4)
        assert point["to"] - point["from"] <= piece
    assert sum(seen) == rows * (5 * length - 2)


def test_nothing_gained_is_nothing_to_keep():
    net = model()
    with torch.no_grad():
        net.lm_head.weight.zero_()
    have = adaptation(net, tokens(0, 64), tokens(1, 64), 16, 4, 4)
    assert have["first"] == have["again"] == have["after"] == pytest.approx(math.log(VOCABULARY))
    assert have["kept"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0; expected a positive integer"),
        ({"length": 2}, "length is 2; expected at least 3"),
        ({"piece": 0}, r"piece is 0; expected in \[1, 15\)"),
        ({"piece": 15}, r"piece is 15; expected in \[1, 15\)"),
        ({"rows": 5}, "a is 64 tokens long; expected at least 80, 5 times 16"),
        ({"rows": 3}, "b is 40 tokens long; expected at least 48"),
    ],
)
def test_bad_adaptation(options, message):
    with pytest.raises(ValueError, match=message):
        adaptation(model(), tokens(0, 64), tokens(1, 40), **{"length": 16, "rows": 2, "piece": 4, **options})
