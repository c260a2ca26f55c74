"""What holds of logs in half precision (docs/design.md, section 3), and that its check notices what goes wrong."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fwpkm import FastWeights, MemoryConfig, MemoryState, fast_weight_memory
from fwpkm.functional import columns
from fwpkm.memory import state as states
from fwpkm.memory.config import LOG_DTYPES
from tests.draws import Draw
from tests.rounding import ERROR, Followed, following, records_of
from tests.test_functional import Inputs

pytestmark = pytest.mark.numerical

HALF = [dtype for dtype in LOG_DTYPES if dtype != "float32"]
LENGTH, CHUNK = 512, 16


def text(seed: int) -> Inputs:
    """One sequence, and weights to start from, in float32; residuals are near 1."""
    draw = Draw(seed, torch.float32)
    keys, values = draw.uniform(1, 2, 32, 8) - 0.5, draw.normal(1024, 64) / 8
    return Inputs(draw.normal(1, LENGTH, 1, 16), draw.normal(1, LENGTH, 64), draw.uniform(1, LENGTH), keys, values)


def config(**fields: Any) -> MemoryConfig:
    options = {"topk": 4, "chunk_size": CHUNK, "write_scale": "exact", "key_update": "slow", "log_dtype": "bfloat16"}
    return MemoryConfig(**options | fields)


def start(weights: FastWeights, settings: MemoryConfig) -> MemoryState:
    """A memory that keeps all its records."""
    return dataclasses.replace(MemoryState.start(weights, settings, 1), keeps_log=True)


@torch.no_grad()
def read(inputs: Inputs, settings: MemoryConfig, length: int = 7, **options: Any) -> tuple[Tensor, MemoryState]:
    """The text in pieces of ``length`` tokens."""
    memory, outputs = start(inputs.weights, settings), []
    for first, stop in pairwise((*range(0, LENGTH, length), LENGTH)):
        result = fast_weight_memory(*inputs.tokens(first, stop), memory, settings, **options)
        memory = result.state
        outputs.append(result.output)
    return torch.cat(outputs, 1), memory


def check(inputs: Inputs, settings: MemoryConfig, output: Tensor, state: MemoryState) -> Followed:
    """What was read in pieces against one call that goes on with its records."""
    with torch.no_grad(), following([records_of(state)]) as followed:
        whole = fast_weight_memory(*inputs[:3], inputs.weights, settings)
    assert_close(output, whole.output, rtol=ERROR, atol=ERROR)
    return followed


def test_there_is_one_half_precision_log():
    """Another one needs a check of its own in ``tests/rounding.py``."""
    assert HALF == ["bfloat16"]


@pytest.mark.parametrize(
    ("length", "options"),
    [(1, {}), (7, {}), (300, {}), (7, {"write_scale": "reference", "learning_rate": 0.3}), (7, {"lookahead": 3})],
)
def test_a_record_is_the_rounding_of_a_number_within_float32_s_error(length, options):
    """However the text is cut; few residuals are as near to the middle of two halves."""
    compared = neighbours = 0
    for seed in range(1 if length == 1 else 3):
        inputs, settings = text(seed), config(**options)
        followed = check(inputs, settings, *read(inputs, settings, length))
        compared, neighbours = compared + followed.compared, neighbours + followed.neighbours
    assert compared >= (LENGTH - CHUNK) * 64
    assert neighbours < 1e-3 * compared


def test_a_record_does_not_change():
    """What has been rounded is never rounded or computed again: the log of a prefix is the beginning of the log."""
    inputs, settings, memory, before = text(0), config(), None, None
    for first, stop in pairwise(range(0, LENGTH + 1, 8)):
        memory = memory or start(inputs.weights, settings)
        with torch.no_grad():
            memory = fast_weight_memory(*inputs.tokens(first, stop), memory, settings).state
        now = memory.log.records.columns()[2]
        assert before is None or torch.equal(now[:, : before.shape[1]], before)
        before = now.clone()


@pytest.mark.parametrize("log_dtype", HALF)
def test_training_does_not_round(log_dtype):
    inputs = text(0)
    output, state = read(inputs, config(log_dtype=log_dtype), training=True)
    plain, exact = read(inputs, config(log_dtype="float32"))
    assert torch.equal(output, plain)
    assert torch.equal(records_of(state), records_of(exact))


def test_a_neighbour_is_no_fault_and_goes_on():
    """A residual in the middle of two halves may be either; the path that is followed goes on with its own."""
    followed = Followed()
    middle = torch.tensor([1 + 2**-8, -3 - 2**-7])
    for given in ((1.0, -3.0), (1 + 2**-7, -3 - 2**-6)):
        followed.take(middle, torch.tensor(given))
    assert (followed.compared, followed.neighbours) == (4, 2)
    with pytest.raises(AssertionError, match="outside of what is rounded"):
        followed.take(middle + 3 * ERROR, torch.tensor([1.0, -3.0]))
    with pytest.raises(AssertionError, match="not rounded to bfloat16"):
        followed.take(middle, middle)


FAULTS = {
    "rounded to float16": lambda x: x.half().float(),
    "rounded to float16 first": lambda x: x.half().float().bfloat16().float(),
    "not rounded": lambda x: x,
    "cut, not rounded": lambda x: (x.view(torch.int32) & -65536).view(torch.float32),
    "rounded to fewer bits": lambda x: x.to(torch.float8_e4m3fn).float(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_rounding_is_noticed(fault, monkeypatch):
    """On the path that is checked."""
    inputs, settings = text(0), config()
    record = MemoryState.record

    def wrong(self: MemoryState, records: Any, training: bool) -> MemoryState:
        slots, coefficients, residuals, *others = records
        kept = FAULTS[fault](residuals)
        return record(self, [slots, coefficients, kept, *others], training=True)

    monkeypatch.setattr(MemoryState, "record", wrong)
    path = read(inputs, settings)
    with pytest.raises(AssertionError, match=r"not rounded to bfloat16|outside of what is rounded"):
        check(inputs, settings, *path)


@pytest.mark.parametrize("dtype", [torch.float16, None])
def test_wrong_rounding_of_all_paths_is_noticed(dtype, monkeypatch):
    for module in (states, columns):
        monkeypatch.setattr(module, "residual_dtype", lambda *_: dtype)
    inputs, settings = text(0), config()
    with pytest.raises((AssertionError, ValueError), match=r"what is read is rounded to|log.residuals.dtype is"):
        check(inputs, settings, *read(inputs, settings))


@pytest.mark.parametrize("what", ["residual", "coefficient", "slot"])
def test_a_missing_record_is_noticed(what, monkeypatch):
    """Of one token of 512, whether it was written and not kept, or kept and not read."""
    inputs, settings = text(0), config()
    record, taken = MemoryState.record, 0

    def wrong(self: MemoryState, records: Any, training: bool) -> MemoryState:
        nonlocal taken
        slots, coefficients, residuals, *others = (x.clone() for x in records)
        here = slice(200 - taken, 201 - taken) if taken <= 200 < taken + slots.shape[1] else slice(0, 0)
        taken += slots.shape[1]
        if what == "residual":
            residuals[:, here] = 0
        elif what == "coefficient":
            coefficients[:, here] = 0
        else:
            slots[:, here] = -1
        return record(self, [slots, coefficients, residuals, *others], training)

    monkeypatch.setattr(MemoryState, "record", wrong)
    path = read(inputs, settings)
    with pytest.raises(AssertionError):
        check(inputs, settings, *path)
