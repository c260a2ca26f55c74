"""The index of a write log: the same reads as the log itself, however it has grown; and few levels."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm import MemoryConfig, fast_weight_memory, ops, reference
from fwpkm.memory import log_index, state
from fwpkm.memory.log_index import LogIndex
from fwpkm.ops import IndexedLog, Log
from tests.draws import Draw, also, seeds
from tests.test_functional import OVERSHOT, any_case, configs, dense, draw_inputs, sizes
from tests.test_packing import MASKED, flags, masks

pytestmark = pytest.mark.numerical


@pytest.fixture(autouse=True)
def small_levels(monkeypatch):
    """Every log has an index, every level merges early, and sums up early."""
    monkeypatch.setattr(state, "_INDEXED", 1)
    monkeypatch.setattr(log_index, "_GROWTH", 2)
    monkeypatch.setattr(log_index, "_MANY", 2)


def draw_log(draw: Draw, memories: int, records: int, chunk: int, lookahead: int, n: int, dtype: torch.dtype) -> Log:
    """Records of whole chunks; memories that have fewer of them than there is room for."""
    chunks = (torch.arange(records) // chunk * 3).expand(memories, -1)
    lengths = draw.integers(records // chunk + 1, memories) * chunk
    slots = draw.integers(n + 1, memories, records, 3) - 1
    residuals = draw.normal(memories, records, 3).to(dtype)
    return Log(slots, draw.normal(memories, records, 3), residuals, chunks, lengths, lookahead)


def grown(log: Log, steps: int, chunk: int, n: int) -> LogIndex:
    """The log's index, extended by some chunks at a time."""
    index = LogIndex(n, torch.zeros_like(log.lengths))
    for step in range(1, steps + 1):
        lengths = log.lengths // chunk * step // steps * chunk
        index = index.extend(log._replace(lengths=lengths))
    return index


def scan_inputs(draw: Draw, memories: int, n: int) -> dict[str, torch.Tensor]:
    shape = (memories, 2, 4, 2)
    return {
        "values": draw.normal(n, 3),
        "slots": draw.integers(n, *shape),
        "weights": draw.normal(*shape),
        "coefficients": draw.normal(*shape),
        "targets": draw.normal(*shape[:3], 3),
        "gates": draw.uniform(*shape[:3]),
    }


logs = {
    "seed": seeds,
    "memories": st.integers(1, 3),
    "records": st.integers(0, 24),
    "chunk": st.integers(1, 4),
    "lookahead": st.integers(0, 2),
    "steps": st.integers(1, 5),
    "n": st.sampled_from([2, 6, 40]),
    "dtype": st.sampled_from([torch.float64, torch.bfloat16]),
}


@given(resets=st.booleans(), **logs)
def test_a_scan_reads_the_index_as_it_reads_the_log(resets, seed, memories, records, chunk, lookahead, steps, n, dtype):
    draw = Draw(seed)
    log = draw_log(draw, memories, records, chunk, lookahead, n, dtype)
    inputs = scan_inputs(draw, memories, n)
    log = log._replace(slots=log.slots[..., :2], coefficients=log.coefficients[..., :2])
    sequences = draw.integers(2, memories, 2, 4).cummax(1).values if resets else None
    index = grown(log, steps, chunk, n)
    assert torch.equal(index.covered, log.lengths)
    have = ops.memory_scan(**inputs, log=IndexedLog(n, log.residuals, index.levels), sequences=sequences)
    assert_close(have, ops.memory_scan(**inputs, log=log, sequences=sequences))


@given(**logs)
def test_an_index_of_chosen_memories(seed, memories, records, chunk, lookahead, steps, n, dtype):
    """Selected, repeated and emptied memories, as a beam search and a new sequence leave them."""
    draw = Draw(seed)
    log = draw_log(draw, memories, records, chunk, lookahead, n, dtype)
    log = log._replace(slots=log.slots[..., :2], coefficients=log.coefficients[..., :2])
    chosen = draw.integers(memories, 4)
    emptied = draw.integers(2, 4).bool()
    kept = Log(*(x[chosen] for x in log[:5]), log.lookahead)
    kept = kept._replace(lengths=torch.where(emptied, 0, kept.lengths))
    index = grown(log, steps, chunk, n).select(chosen).without(emptied)
    assert torch.equal(index.covered, kept.lengths)
    inputs = scan_inputs(draw, 4, n)
    have = ops.memory_scan(**inputs, log=IndexedLog(n, kept.residuals, index.levels))
    assert_close(have, ops.memory_scan(**inputs, log=kept))


@also(
    40,
    **{name: choices for name, choices in any_case.items() if name != "length"},
    masked=MASKED,
    restarts=[None, 0.1, 0.3],
    cuts=lambda pick: [pick.randint(1, 39) for _ in range(pick.randint(0, 12))],
    fold=[False, True],
)
@given(
    config=configs,
    seed=seeds,
    masked=masks,
    restarts=st.sampled_from([None, 0.1, 0.3]),
    cuts=st.lists(st.integers(1, 39), max_size=12),
    fold=st.booleans(),
    batch=sizes["batch"],
    heads=sizes["heads"],
    n=sizes["n"],
)
def test_reading_with_an_index_is_the_reference(config, seed, masked, restarts, cuts, fold, batch, heads, n):
    config = dataclasses.replace(config, learning_rate=0.3, detach_every=None)
    inputs = draw_inputs(seed, batch, 40, heads, n)
    mask = flags(seed, masked, batch, 40)
    reset = None if config.scope == "shared" else flags(seed + 1, restarts, batch, 40)
    want = reference.fast_weight_memory(*inputs, config, mask=mask, reset=reset)
    assume(want.output.abs().max() < OVERSHOT)
    memory, outputs, bounds = inputs.weights, [], sorted({0, *cuts, 40})
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if not fold:
            patch.setattr(state.MemoryState, "folded", lambda self: self)
        for start, stop in pairwise(bounds):
            pieces = (None if x is None else x[:, start:stop] for x in (mask, reset))
            result = fast_weight_memory(*inputs.tokens(start, stop), memory, config, *pieces)
            memory = result.state
            outputs.append(result.output)
    assert_close(torch.cat(outputs, 1), want.output)
    assert_close(dense(memory), want.values)


@pytest.mark.parametrize("hot", [False, True])
def test_levels_are_few_and_a_hot_slot_is_one_row(hot, monkeypatch):
    """After 64 extensions of 32 entries; every token reads slot 0 or, not hot, another one."""
    monkeypatch.setattr(log_index, "_GROWTH", 4)
    monkeypatch.setattr(log_index, "_MANY", 8)
    draw, records, chunk, n = Draw(0), 64 * 16, 16, 4096
    slots = torch.zeros(1, records, 2, dtype=torch.int64)
    slots[..., 1] = draw.integers(n - 1, 1, records) + 1
    if not hot:
        slots[..., 0] = draw.integers(n - 1, 1, records) + 1
    chunks = (torch.arange(records) // chunk).unsqueeze(0)
    log = Log(slots, draw.normal(1, records, 2), draw.normal(1, records, 3), chunks, torch.tensor([records]), 1)
    index = grown(log, 64, chunk, n)
    written = sum(level.keys.numel() for level in index.levels)
    assert len(index.levels) <= 4
    if hot:
        assert [0] in [level.sum_keys.tolist() for level in index.levels]
        assert sum(int((level.keys == 0).sum()) for level in index.levels) <= 8 * len(index.levels)
        assert records - 64 <= written + 64 < 2 * records - 64
    else:
        assert written == 2 * (records - 64)  # the last token of a chunk writes nothing


def test_a_graph_has_no_index(monkeypatch):
    """Where a gradient is recorded, under ``torch.func`` and in a compiled graph the log itself is read."""
    config = MemoryConfig(topk=2, chunk_size=4, key_update="slow")
    inputs = draw_inputs(0, 1, 24, 1, 30)  # slots enough for the log not to be folded
    with torch.no_grad():
        start = fast_weight_memory(*inputs.tokens(0, 16), inputs.weights, config).state
        plain = fast_weight_memory(*inputs.tokens(16, 24), start, config)
    assert plain.state.log.index is not None

    def outputs(query):
        return fast_weight_memory(query, *inputs.tokens(16, 24)[1:], plain.state, config).output

    query = inputs.query[:, 16:24]
    with torch.no_grad():
        want = outputs(query)
        batch = torch.stack((query, query))
        assert_close(torch.vmap(outputs)(batch), torch.stack((want, want)))
        compiled = torch.compile(outputs, fullgraph=True, backend="eager")
        assert_close(compiled(query), want)
    leaf = query.clone().requires_grad_()
    result = fast_weight_memory(leaf, *inputs.tokens(16, 24)[1:], start, config)
    again = fast_weight_memory(leaf, *inputs.tokens(16, 24)[1:], result.state, config)
    assert again.state.log.index is None
    graph = torch.autograd.grad(again.output.sum(), leaf)[0]
    monkeypatch.setattr(state, "_INDEXED", 10**9)
    result = fast_weight_memory(leaf, *inputs.tokens(16, 24)[1:], start, config)
    again = fast_weight_memory(leaf, *inputs.tokens(16, 24)[1:], result.state, config)
    assert_close(graph, torch.autograd.grad(again.output.sum(), leaf)[0])
