"""Attribution: every read is the sum of what was there and what tokens stored, each part where it belongs."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm import MemoryConfig, MemoryState, fast_weight_memory, reference
from fwpkm.memory import attribution
from fwpkm.memory.attribution import Writes, seen_by_own_tokens
from fwpkm.memory.write_log import WriteLog
from tests.draws import seeds
from tests.test_functional import configs, draw_inputs

pytestmark = pytest.mark.numerical

drawn = {
    "config": configs.map(lambda c: dataclasses.replace(c, scope="sequence", detach_every=None)),
    "seed": seeds,
    "length": st.integers(1, 30),
    "heads": st.integers(1, 2),
    "n": st.integers(4, 5),
}


def read(inputs, config, cuts=(), state=None):
    """What a memory that keeps its log gives along the tokens: reads, slots, weights and the state at the end."""
    state = state or dataclasses.replace(MemoryState.start(inputs.weights, config, 1), keeps_log=True)
    parts, length = [], inputs.query.shape[1]
    with torch.no_grad():
        for start, stop in pairwise(sorted({0, length, *(c for c in cuts if c < length)})):
            result = fast_weight_memory(*inputs.tokens(start, stop), state, config)
            state = result.state
            parts.append((result.output[0], result.slots[0], result.weights[0]))
    return *(torch.cat(x) for x in zip(*parts, strict=True)), state


def plain(inputs, config):
    """The contribution ``[T, T, Dv]`` of each token to each read, by the formulas of the design, pair by pair."""
    want = reference.fast_weight_memory(*inputs, config)
    length, chunk, ahead = want.output.shape[1], config.chunk_size, config.lookahead
    output, slots, weights = want.output[0], want.slots[0], want.weights[0]
    kappa = reference.write_scale(weights, config.write_scale, chunk, ahead)
    parts = output.new_zeros(length, length, output.shape[1])
    for reader in range(length):
        for source in range(reader // chunk * chunk):
            target = source + ahead
            if target // chunk != source // chunk:
                continue
            residual = inputs.gate[0, source] * (inputs.target[0, target] - output[source])
            together = slots[source // chunk * chunk : (source // chunk + 1) * chunk]
            for slot, weight in zip(slots[reader], weights[reader], strict=True):
                for written, its_weight in zip(slots[source], weights[source], strict=True):
                    if slot == written:
                        size = config.learning_rate * kappa[source] * its_weight / (together == slot).sum()
                        parts[reader, source] += weight * size * residual
    return want.output[0], reference.memory_read(inputs.values, slots, weights), parts


def by_pair(split):
    """The terms of a split, ``[P, R, Dv]``."""
    parts = split.base.new_zeros(split.base.shape[0], split.stored.shape[0], split.base.shape[1])
    return parts.index_put((split.readers, split.sources), split.contributions(), accumulate=True)


@given(cuts=st.lists(st.integers(1, 29), max_size=4), **drawn)
def test_every_part_is_the_formula(config, seed, length, heads, n, cuts):
    inputs = draw_inputs(seed, 1, length, heads, n)
    reads, slots, weights, state = read(inputs, config, cuts)
    split = Writes.of(state).split(slots, weights, seen_by_own_tokens(state))
    want, base, parts = plain(inputs, config)
    assert_close(split.base, base)
    have = by_pair(split)
    assert_close(have[:, :length], parts)
    assert not have[:, length:].any()
    assert_close(split.reads(), want)
    assert_close(split.reads(), reads)
    pairs = split.readers * split.stored.shape[0] + split.sources
    assert (pairs.diff() > 0).all()
    share, shares = split.shares(reads)
    assert_close(share.index_add(0, split.readers, shares), (reads != 0).any(1).to(reads.dtype))


@given(terms=st.sampled_from([1, 30, 200]), top=st.integers(1, 5), **drawn)
def test_the_strongest_sources_in_pieces(config, seed, length, heads, n, terms, top):
    inputs = draw_inputs(seed, 1, length, heads, n)
    reads, slots, weights, state = read(inputs, config)
    seen, writes = seen_by_own_tokens(state), Writes.of(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribution, "_TERMS", terms)
        have = writes.strongest(slots, weights, seen, reads, top)
    assert have.error <= 1e-9 * max(1.0, reads.abs().max().item())
    split = writes.split(slots, weights, seen)
    base, shares = split.shares(reads)
    assert_close(have.base, base)
    for reader in range(length):
        known = dict(zip(split.sources[split.readers == reader].tolist(), shares[split.readers == reader], strict=True))
        found = [source for source in have.sources[reader].tolist() if source >= 0]
        assert len(found) == len(set(found)) == min(top, len(known))
        for source, share in zip(found, have.shares[reader], strict=False):
            assert_close(share, known[source])
        assert not have.shares[reader, len(found) :].any()
        sizes = sorted((abs(share.item()) for share in known.values()), reverse=True)
        assert_close(have.shares[reader, : len(found)].abs(), torch.tensor(sizes[:top], dtype=reads.dtype))


def test_a_hot_slot_is_shared():
    """Where many tokens of a chunk store in the same slots, each has its part of the average."""
    config = MemoryConfig(topk=2, chunk_size=8, write_scale="exact", key_update="slow")
    inputs = draw_inputs(0, 1, 24, 1, 4, hot=True)
    reads, slots, weights, state = read(inputs, config)
    split = Writes.of(state).split(slots, weights, seen_by_own_tokens(state))
    assert_close(split.reads(), reads)
    of_last = split.sources[split.readers == 23].tolist()
    assert of_last == [*range(7), *range(8, 15)]  # the last of a chunk stores nothing, and its own cannot be seen
    assert_close(split.amounts[split.readers == 23], torch.full((14,), 1 / 8).double())  # N_s = 8, w / sum w^2 * w = 1


def test_flushed_and_folded_and_later_calls():
    """An early flush has its own length; what was folded is base; a later call is split by the same records."""
    config = MemoryConfig(topk=3, chunk_size=8, key_update="fast")
    inputs, more = draw_inputs(1, 1, 13, 2, 5), draw_inputs(2, 1, 20, 2, 5)
    state = read(inputs, config)[3].flush()
    for folded in (False, True):
        if folded:
            state = dataclasses.replace(state, own_values=state.dense_values(), log=None, committed=0)
        reads, slots, weights, later = read(more, config, state=state)
        seen = seen_by_own_tokens(later)[-20:]
        split = Writes.of(later).split(slots, weights, seen)
        assert_close(split.reads(), reads)
        assert seen[0] == (0 if folded else 13)
        sources = set(split.sources[split.readers == 0].tolist())
        assert sources if not folded else not sources
    nothing = Writes.of(MemoryState.start(inputs.weights, config, 1))
    split = nothing.split(slots, weights, torch.zeros_like(seen))
    assert split.sources.numel() == 0
    assert_close(split.reads(), reference.memory_read(inputs.values, slots, weights))


def test_rounded_records():
    config = MemoryConfig(topk=4, chunk_size=16, write_scale="exact", key_update="slow", log_dtype="bfloat16")
    inputs = draw_inputs(3, 1, 100, 1, 5).to(torch.float32)
    reads, slots, weights, state = read(inputs, config)
    assert state.log.residuals.dtype == torch.bfloat16
    split = Writes.of(state).split(slots, weights, seen_by_own_tokens(state))
    assert_close(split.reads(), reads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", [0, 1, 2, 3])
def test_a_wrong_record_shows(field):
    """Another slot, coefficient, residual or chunk in one record, and the parts no longer add up to the reads."""
    config = MemoryConfig(topk=3, chunk_size=4, write_scale="exact", key_update="slow")
    inputs = draw_inputs(4, 1, 24, 1, 4)
    reads, slots, weights, state = read(inputs, config)
    seen = seen_by_own_tokens(state)
    assert Writes.of(state).strongest(slots, weights, seen, reads, 1).error < 1e-9
    fields = [x.clone() for x in state.log.records.columns()]
    fields[field][0, 6] = fields[field][0, 6] + (0.5 if field in (1, 2) else 1)
    records = type(state.log.records).of(fields)
    wrong = dataclasses.replace(state, log=WriteLog(records, state.log.lookahead))
    assert Writes.of(wrong).strongest(slots, weights, seen, reads, 1).error > 1e-3


def test_a_read_of_zero_has_no_shares():
    config = MemoryConfig(topk=2, chunk_size=4, key_update="slow")
    inputs = draw_inputs(5, 1, 4, 1, 4)
    inputs = inputs._replace(values=torch.zeros_like(inputs.values))
    reads, slots, weights, state = read(inputs, config)
    have = Writes.of(state).strongest(slots, weights, seen_by_own_tokens(state), reads, 2)
    assert have.base.tolist() == [0.0] * 4
    assert have.sources.tolist() == [[-1, -1]] * 4


def test_bad_input():
    config = MemoryConfig(topk=2, chunk_size=4)
    inputs = draw_inputs(6, 2, 8, 1, 4)

    def state(config=config, **options):
        return fast_weight_memory(*inputs[:3], inputs.weights, config, **options).state

    for wrong, message in (
        (state(), "memories is 2; expected 1"),
        (state(dataclasses.replace(config, scope="shared")), "columns is 2; expected 1"),
        (state(mask=torch.ones(2, 8, dtype=torch.bool)).select([0]), "state is one that has read with a mask"),
    ):
        with pytest.raises(ValueError, match=message):
            Writes.of(wrong)
    with pytest.raises(ValueError, match="memories is 2"):
        seen_by_own_tokens(state())
    reads, slots, weights, known = read(inputs.rows(slice(0, 1)), config)
    writes, seen = Writes.of(known), seen_by_own_tokens(known)
    for arguments, message in (
        ((slots[0], weights, seen), r"slots.shape is \[2\]"),
        ((slots, weights[:1], seen), r"weights.shape is \[1, 2\]; expected \[8, 2\]"),
        ((slots, weights, seen[1:]), r"seen.shape is \[7\]; expected \[8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            writes.split(*arguments)
    with pytest.raises(ValueError, match="top is 0"):
        writes.strongest(slots, weights, seen, reads, 0)
    with pytest.raises(ValueError, match=r"reads.shape is \[7, 4\]"):
        writes.strongest(slots, weights, seen, reads[1:], 1)
