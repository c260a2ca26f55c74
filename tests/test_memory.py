"""Configuration, starting points and states: what they refuse, and what they promise beyond the laws."""

import dataclasses
import math

import pytest
import torch

from fwpkm import FastWeights, MemoryConfig, MemoryState, fast_weight_memory
from fwpkm.memory import WRITE_SCALES
from fwpkm.memory.formulas import reads_of_slot, relative_write_scale, weights_of, write_coefficients
from tests.draws import Draw

QUERY, TARGET, GATE = torch.randn(2, 6, 1, 4), torch.randn(2, 6, 3), torch.rand(2, 6)
START = FastWeights(torch.randn(1, 2, 5, 2), torch.randn(25, 3))
CONFIG = MemoryConfig(topk=2, chunk_size=4)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("topk", 0, "an integer >= 1"),
        ("topk", 2.5, "an integer >= 1"),
        ("chunk_size", 0, "an integer >= 1"),
        ("lookahead", -1, "an integer >= 0"),
        ("learning_rate", -0.1, "a number >= 0"),
        ("addressing_weight", -1.0, "a number >= 0"),
        ("score_eps", 0.0, "a number > 0"),
        ("temperature", 0.0, "a number > 0"),
        ("write_scale", "big", "'reference' or 'paper' or 'exact'"),
        ("score", "cosine", "'idw' or 'dot'"),
        ("nonlinearity", "tanh", "'softmax' or 'relu' or 'silu'"),
        ("key_update", "never", "'fast' or 'train_only' or 'slow'"),
        ("scope", "token", "'sequence' or 'shared'"),
        ("detach_every", 0, "None or an integer >= 1"),
        ("topk", True, "an integer >= 1"),
        ("chunk_size", "8", "an integer >= 1"),
        ("learning_rate", math.inf, "a number >= 0, and finite"),
        ("learning_rate", "1", "a number >= 0, and finite"),
        ("addressing_weight", math.nan, "a number >= 0, and finite"),
        ("score_eps", math.inf, "a number > 0, and finite"),
        ("temperature", True, "a number > 0, and finite"),
        ("detach_every", 2.0, "None or an integer >= 1"),
        ("log_dtype", "float16", "'float32' or 'bfloat16'"),
    ],
)
def test_bad_configuration(field, value, expected):
    with pytest.raises(ValueError, match=f"^{field} is {value!r}; expected {expected}"):
        MemoryConfig(**{field: value})


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.randn(2, 5, 2), torch.randn(25, 3), r"keys.shape is .*; expected \[M, H, 2, n, Dk/2\]"),
        (torch.randn(1, 3, 5, 2), torch.randn(25, 3), r"keys.shape is .*; expected \[M, H, 2, n, Dk/2\]"),
        (torch.randn(1, 2, 5, 2), torch.randn(24, 3), r"values.shape is \[24, 3\]; expected \[25, Dv\]"),
        (
            torch.randn(1, 2, 5, 2).half(),
            torch.randn(25, 3).half(),
            "keys.dtype is torch.float16; expected torch.float",
        ),
        (torch.randn(1, 2, 5, 2), torch.randn(25, 3).double(), "values.dtype is torch.float64; expected torch.float32"),
    ],
)
def test_bad_starting_point(keys, values, message):
    with pytest.raises(ValueError, match=message):
        FastWeights(keys, values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": QUERY[0]}, r"query.shape is \[6, 1, 4\]; expected \[B, T, H, Dk\]"),
        ({"query": torch.randn(2, 6, 1, 5)}, r"query.shape is \[2, 6, 1, 5\]; expected \[B, T, 1, 4\]"),
        ({"query": torch.randn(2, 6, 3, 4)}, r"query.shape is \[2, 6, 3, 4\]; expected \[B, T, 1, 4\]"),
        ({"query": QUERY.long()}, "query.dtype is torch.int64; expected a floating dtype"),
        ({"target": TARGET[:, :5]}, r"target.shape is \[2, 5, 3\]; expected \[2, 6, 3\]"),
        ({"target": TARGET.int()}, "target.dtype is torch.int32; expected a floating dtype"),
        ({"gate": GATE[:1]}, r"gate.shape is \[1, 6\]; expected \[2, 6\]"),
        ({"gate": GATE > 0.5}, "gate.dtype is torch.bool; expected a floating dtype"),
        ({"mask": GATE}, "mask.dtype is torch.float32; expected torch.bool"),
        ({"mask": GATE[:, :5] > 0}, r"mask.shape is \[2, 5\]; expected \[2, 6\]"),
        ({"reset": GATE.long()}, "reset.dtype is torch.int64; expected torch.bool"),
        ({"reset": GATE[0] > 0}, r"reset.shape is \[6\]; expected \[2, 6\]"),
        ({"query": QUERY * torch.nan}, "query or keys holds NaN; expected numbers"),
        ({"target": TARGET * torch.nan}, "targets holds NaN; expected numbers"),
        ({"gate": GATE * torch.nan}, "gates holds NaN; expected numbers"),
        ({"query": QUERY[:, :0], "target": TARGET[:, :0], "gate": GATE[:, :0]}, r"query.shape\[:2\] is \[2, 0\]"),
        ({"config": MemoryConfig(topk=6)}, r"config.topk is 6; expected at most n_subkeys \(5\)"),
        ({"memory": FastWeights(torch.randn(3, 1, 2, 5, 2), START.values)}, r"keys.shape\[0\] is 3; expected 1 or 2"),
    ],
)
def test_bad_call(wrong, message):
    good = {"query": QUERY, "target": TARGET, "gate": GATE, "memory": START, "config": CONFIG}
    with pytest.raises(ValueError, match=message):
        fast_weight_memory(**good | wrong)


def test_a_state_is_continued_with_its_configuration_and_batch():
    state = fast_weight_memory(QUERY, TARGET, GATE, START, CONFIG).state
    other = dataclasses.replace(CONFIG, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"config is .*; expected the configuration of the state"):
        fast_weight_memory(QUERY, TARGET, GATE, state, other)
    with pytest.raises(ValueError, match=r"query.shape\[0\] is 1; expected 2, the batch of the state"):
        fast_weight_memory(QUERY[:1], TARGET[:1], GATE[:1], state, CONFIG)
    with pytest.raises(ValueError, match="memories is 2; expected 1"):
        state.fold()


def test_memories_can_start_from_keys_of_their_own():
    keys = torch.randn(2, 1, 2, 5, 2)
    together = fast_weight_memory(QUERY, TARGET, GATE, FastWeights(keys, START.values), CONFIG)
    for row in range(2):
        alone = fast_weight_memory(
            QUERY[row : row + 1],
            TARGET[row : row + 1],
            GATE[row : row + 1],
            FastWeights(keys[row], START.values),
            CONFIG,
        )
        torch.testing.assert_close(alone.output, together.output[row : row + 1])


def test_state_counts_positions_and_commits():
    state = fast_weight_memory(QUERY, TARGET, GATE, START, CONFIG).state
    assert (state.position, state.origin, state.commits, state.open_tokens) == (6, 0, 1, 2)
    flushed = state.flush()
    assert (flushed.position, flushed.origin, flushed.commits, flushed.open) == (6, 6, 2, None)
    assert flushed.flush() is flushed
    assert (state.position, state.commits) == (6, 1)  # a state is never changed


def test_the_base_is_referred_to_not_copied():
    state = fast_weight_memory(QUERY, TARGET, GATE, START, CONFIG).state
    assert state.base.values.data_ptr() == START.values.data_ptr()


def test_a_chunk_no_longer_than_the_lookahead_stores_nothing_but_moves_keys():
    config = MemoryConfig(topk=2, chunk_size=2, lookahead=2)
    state = fast_weight_memory(QUERY[:1], TARGET[:1], GATE[:1], START, config).state
    assert torch.equal(state.fold().values, START.values)
    assert not torch.allclose(state.keys[0], START.keys)


def test_relative_write_scale():
    config = MemoryConfig(chunk_size=8, lookahead=2)
    scale = relative_write_scale(config, torch.tensor([8, 4, 2]))
    assert scale.tolist() == pytest.approx([1, (4 / 2) / (8 / 6), 0])
    assert relative_write_scale(dataclasses.replace(config, write_scale="paper"), torch.tensor([4])) == 1


@pytest.mark.parametrize("scale", WRITE_SCALES)
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_weights_are_had_back_from_coefficients(scale, rate):
    """Of tokens with no weight too; where nothing is ever written there are none."""
    config = MemoryConfig(chunk_size=5, lookahead=2, write_scale=scale, learning_rate=rate)
    weights = Draw(0).normal(2, 3, 4)
    weights[0, 1] = 0
    torch.testing.assert_close(weights_of(write_coefficients(weights, config), config), weights)
    for never in (dataclasses.replace(config, learning_rate=0.0), dataclasses.replace(config, chunk_size=2)):
        assert not weights_of(write_coefficients(weights, never), never).any()


def test_reads_of_slot():
    draw = Draw(0)
    slots, chunks = draw.integers(5, 3, 8, 2), draw.integers(3, 3, 8)
    counts = reads_of_slot(slots, chunks, 5)
    for m in range(3):
        for t in range(8):
            for j in range(2):
                same = (slots == slots[m, t, j]) & (chunks == chunks[m, t]).unsqueeze(-1)
                assert counts[m, t, j] == same.sum()


def test_state_of_nothing_read():
    state = MemoryState.start(START, CONFIG, 1)
    assert torch.equal(state.fold().values, START.values)
    assert state.flush() is state
