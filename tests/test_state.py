"""What a memory state promises: its log, copies, crops and files."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from fwpkm import FastWeights, MemoryConfig, MemoryState, fast_weight_memory, reference
from fwpkm.memory import KEY_UPDATES
from fwpkm.memory.forget import forget
from tests.draws import also, any_cuts, seeds
from tests.rounding import following, records_of
from tests.test_functional import OVERSHOT, Inputs, any_case, configs, dense, draw_inputs, sizes
from tests.test_packing import MASKED, flags, masks, run

RECORDS = ("slots", "coefficients", "residuals", "chunks", "gates")


@given(config=configs, seed=seeds, cuts=st.lists(st.integers(1, 19), max_size=4), stop=st.integers(1, 20), **sizes)
def test_a_record_is_a_function_of_the_prefix(config, seed, cuts, stop, **size):
    """The log of a prefix is the first part of the log of the whole, however either was cut into calls."""
    inputs = draw_inputs(seed, **size)
    config = dataclasses.replace(config, detach_every=None)
    stop = min(stop, size["length"])
    prefix = Inputs(*(x[:, :stop] for x in inputs[:3]), *inputs[3:])
    leaf = inputs.values.clone().requires_grad_()  # the log of a graph is not folded
    whole = run(inputs._replace(values=leaf), config, [c for c in cuts if c < size["length"]])[1].state
    start = run(prefix._replace(values=leaf), config, [])[1].state
    assume(whole.log.residuals.abs().max() < OVERSHOT)
    assert start.filled == stop * start.columns
    for name in RECORDS:
        have = getattr(whole.log, name)[:, : start.filled]
        assert_close(have, getattr(start.log, name)[:, : start.filled], rtol=1e-6, atol=1e-8)


def test_the_record_of_a_token_has_the_residual_of_the_one_before():
    """Section 3, by hand: slots and undivided coefficients of ``t``, residual of ``t - L``, 0 at a chunk's start."""
    config = MemoryConfig(topk=2, chunk_size=4, write_scale="paper", key_update="slow", learning_rate=0.5)
    inputs = draw_inputs(0, 1, 7, 1, 5)
    leaf = inputs.values.clone().requires_grad_()
    result = fast_weight_memory(*inputs[:3], FastWeights(inputs.keys, leaf), config)
    log = result.state.log
    assert torch.equal(log.slots, result.slots)
    assert_close(log.coefficients, 0.5 * result.weights)
    assert_close(log.gates, inputs.gate)
    assert log.chunks[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    for t in range(7):
        residual = inputs.gate[0, t - 1] * (inputs.target[0, t] - result.output[0, t - 1])
        assert_close(log.residuals[0, t], torch.zeros(4).double() if t in (0, 4) else residual)


def test_appends_copy_each_record_a_few_times_only():
    """Token by token the records move to new tensors only when their room is used up: a logarithmic number of times."""
    config = MemoryConfig(topk=1, chunk_size=8)
    inputs = draw_inputs(0, 1, 300, 1, 40)
    state, places = inputs.weights, set()
    with torch.no_grad():
        for t in range(300):
            state = fast_weight_memory(*inputs.tokens(t, t + 1), state, config).state
            places.add(state.log.residuals.data_ptr())
    assert state.own_values is None
    assert len(places) <= 10


@given(config=configs, seed=seeds, masked=masks, restarts=st.sampled_from([None, 0.1, 0.5]), **sizes)
def test_a_fork_and_its_origin_go_their_own_ways(config, seed, masked, restarts, **size):
    """Three continuations of one state, in any order, share no memory that one of them writes."""
    config = dataclasses.replace(config, learning_rate=0.1)
    inputs = draw_inputs(seed, **size)
    mask = flags(seed, masked, size["batch"], size["length"])
    with torch.no_grad():
        cuts = [1, size["length"] // 2] if size["length"] > 2 else []  # with free columns, which both would append to
        state = run(inputs, config, cuts, mask=mask)[1].state
        others = [draw_inputs(seed + i, **size)[:3] for i in (1, 2, 3)]
        reset = flags(seed + 4, restarts, size["batch"], size["length"]) if config.scope == "sequence" else None
        alone = [run(inputs, config, cuts, mask=mask)[1].state for _ in others]
        want = [
            fast_weight_memory(*x, own, config, reset=r)
            for x, own, r in zip(others, alone, (reset, None, None), strict=True)
        ]
        first = fast_weight_memory(*others[0], state, config, reset=reset)
        fork = fast_weight_memory(*others[1], state.fork(), config)
        again = fast_weight_memory(*others[2], state, config)
        for have, expected in zip((first, fork, again), want, strict=True):
            assert torch.equal(have.output, expected.output)
            assert torch.equal(dense(have.state), dense(expected.state))
        on = [fast_weight_memory(*others[0], x.state, config).output for x in (first, fork, again)]
        wanted = [fast_weight_memory(*others[0], x.state, config).output for x in want]
        assert all(torch.equal(a, b) for a, b in zip(on, wanted, strict=True))


@given(config=configs, seed=seeds, **sizes)
def test_write_back(config, seed, **size):
    """What a state has committed goes into its starting point in place; rows that nobody wrote stay as they were."""
    config = dataclasses.replace(config, scope="shared")
    inputs = draw_inputs(seed, **size)
    result = fast_weight_memory(*inputs[:3], inputs.weights, config, commit_partial=True, training=True)
    assume(result.output.abs().max() < OVERSHOT)
    want, before = result.state.fold(), inputs.values.clone()
    place = inputs.values.data_ptr()
    result.state.write_back()
    assert inputs.values.data_ptr() == place
    assert_close(inputs.values, want.values)
    assert_close(inputs.keys, want.keys)
    untouched = torch.ones(inputs.values.shape[0], dtype=torch.bool)
    untouched[result.slots.flatten()] = False
    assert torch.equal(inputs.values[untouched], before[untouched])


@given(config=configs, seed=seeds, masked=masks, picks=st.lists(st.integers(0, 2), min_size=1, max_size=5), **sizes)
def test_select(config, seed, masked, picks, **size):
    """Rows reordered, dropped and repeated go on as those rows do."""
    config = dataclasses.replace(config, scope="sequence")
    size["batch"] = 3
    inputs, more = draw_inputs(seed, **size), draw_inputs(seed + 1, **size)
    mask = flags(seed, masked, 3, size["length"])
    with torch.no_grad():
        state = fast_weight_memory(*inputs[:3], inputs.weights, config, mask=mask).state
        want = fast_weight_memory(*more[:3], state, config)
        have = fast_weight_memory(*more.rows(picks)[:3], state.select(picks), config)
    assume(want.output.abs().max() < OVERSHOT)
    assert_close(have.output, want.output[picks])
    assert_close(dense(have.state), dense(want.state)[picks])


@also(60, **any_case, masked=MASKED, drop=range(1, 25), cuts=any_cuts, flushed=[False, True], again=range(4))
@given(
    config=configs,
    seed=seeds,
    masked=masks,
    drop=st.integers(0, 30),
    cuts=st.lists(st.integers(1, 23), max_size=4),
    flushed=st.booleans(),
    again=st.integers(0, 3),
    **sizes,
)
def test_crop(config, seed, masked, drop, cuts, flushed, again, **size):
    """Read a, read b, take back b is read a: at any place, in any number of calls, and again from there."""
    first, second, more = (draw_inputs(seed + i, **size) for i in range(3))
    length, batch = size["length"], size["batch"]
    drop = min(drop, 2 * length - 1)
    mask = flags(seed, masked, batch, 2 * length)
    tokens = [torch.cat(pair, 1) for pair in zip(first[:3], second[:3], strict=True)]

    def read(state, start: int, stop: int):
        part = None if mask is None else mask[:, start:stop]
        return fast_weight_memory(*(x[:, start:stop] for x in tokens), state, config, mask=part).state

    with torch.no_grad():
        end = 2 * length - drop
        state = want = first.weights
        places = sorted({0, length, 2 * length, *(cut for cut in cuts if cut < 2 * length)})
        for start, stop in pairwise(places):
            state = read(state, start, stop)
            if start < end:
                want = read(want, start, min(stop, end))
            if flushed and stop == length:
                state = state.flush()
                want = want.flush() if end >= length else want
        cropped = state.crop(drop)
        again = min(again, end - 1 - length if flushed else end - 1)
        if again > 0:  # taken back from there, and read again
            cropped = read(cropped.crop(again), end - again, end)
        want, have = (fast_weight_memory(*more[:3], x, config) for x in (want, cropped))
        assume(want.output.abs().max() < OVERSHOT)
        assert_close(have.output, want.output)
        assert_close(dense(have.state), dense(want.state))
        assert_close(have.state.keys, want.state.keys)
        assert_close(have.addressing_loss, want.addressing_loss)
        whole = fast_weight_memory(*more[:3], state, config)  # the state that was cropped is as it was
        assert_close(dense(whole.state), dense(fast_weight_memory(*more[:3], state.detach(), config).state))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("log_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flushed", [0, 13, 34])
def test_when_a_log_is_folded_depends_on_its_own_records_alone(flushed, log_dtype, masked):
    """Not on where calls end, nor on what else is in the batch; and what is read is the reference's."""
    config = MemoryConfig(topk=2, chunk_size=4, key_update="slow", write_scale="exact", log_dtype=log_dtype)
    inputs = draw_inputs(1, 3, 90, 1, 5)
    mask = flags(3, 0.4, 3, 90) if masked else None
    if mask is not None:
        mask[0] = True
    lengths = [4] * (flushed // 4) + [flushed % 4] * (flushed % 4 > 0)
    lengths += [4] * ((90 - flushed) // 4)
    row = [x[:1] for x in inputs[:3]]
    want = reference.fast_weight_memory(*row, *inputs[3:], config, chunk_lengths=lengths).output[0]

    def kept(rows: int, cuts: list[int]) -> int:
        """How many committed records row 0 has at the end."""
        memory, outputs, bounds = inputs.weights, [], sorted({0, flushed, 90, *cuts})
        for start, stop in pairwise(bounds):
            tokens = (x[:rows, start:stop] for x in inputs[:3])
            here = None if mask is None else mask[:rows, start:stop]
            result = fast_weight_memory(*tokens, memory, config, here, commit_partial=stop == flushed)
            memory = result.state
            outputs.append(result.output[0])
        assert_close(torch.cat(outputs), want)
        assert memory.own_values is not None
        return int(memory.per_memory(memory.committed)[0])

    with torch.no_grad():
        found = {kept(rows, cuts) for rows in (1, 3) for cuts in ([], [5, 6, 7, 50], list(range(0, 90, 7)), [1, 89])}
    assert len(found) == 1


@pytest.mark.parametrize("length", [1, 127, 128, 129, 500])
@pytest.mark.parametrize("key_update", KEY_UPDATES)
@torch.no_grad()
def test_how_far_back_crop_goes(length, key_update):
    """As far as the last 128 tokens, whatever came before in the same call or token by token; not further."""
    config = MemoryConfig(topk=2, chunk_size=50, key_update=key_update)
    inputs = draw_inputs(0, 1, length + 300, 1, 9)
    longer = fast_weight_memory(*inputs.tokens(0, length), inputs.weights, config).state
    for token in range(length, length + 290):
        longer = fast_weight_memory(*inputs.tokens(token, token + 1), longer, config).state
    for state, read in (
        (fast_weight_memory(*inputs.tokens(0, length), inputs.weights, config).state, length),
        (longer, length + 290),
    ):
        most = min(128, read)
        for tokens in {1, most // 2, most - 1} & set(range(1, read)):
            want = fast_weight_memory(*inputs.tokens(0, read - tokens), inputs.weights, config).state
            have = state.crop(tokens)
            assert have.position == want.position
            assert_close(dense(have), dense(want))
            assert_close(have.keys, want.keys)
        assert state.crop(most).position == read - most
        with pytest.raises(ValueError, match=f"tokens is {most + 1}; expected 0 to {most}: the last 128 tokens can be"):
            state.crop(most + 1)


def test_bfloat16_records():
    """Residuals are kept in half the size, in one call and token by token; training does not round."""
    config = MemoryConfig(topk=2, chunk_size=4, key_update="slow", log_dtype="bfloat16")
    inputs = draw_inputs(0, 2, 23, 1, 30).to(torch.float32)  # slots enough for the log not to be folded
    with torch.no_grad():
        output, whole = run(inputs, config, [])
        pieces, last = run(inputs, config, list(range(1, 23)))
        plain, _ = run(inputs, dataclasses.replace(config, log_dtype="float32"), [])
        trained, _ = run(inputs, config, [], training=True)
    assert whole.state.log.residuals.dtype == last.state.log.residuals.dtype == torch.bfloat16
    assert_close(follow(inputs, config, whole.state), output)
    assert_close(follow(inputs, config, last.state), pieces)
    assert not torch.equal(plain, output)
    assert_close(plain, output, rtol=0.05, atol=0.05)
    assert_close(trained, plain)


def follow(inputs: Inputs, config: MemoryConfig, state: MemoryState) -> Tensor:
    """What one call reads that goes on with the records of ``state``, which are checked."""
    with torch.no_grad(), following([records_of(state)]) as followed:
        output, _ = run(inputs, config, [])
    assert followed.compared
    return output


@given(config=configs, seed=seeds, masked=masks, log_dtype=st.sampled_from(["float32", "bfloat16"]), **sizes)
def test_save_and_load(config, seed, masked, log_dtype, tmp_path_factory, **size):
    """A state read back from a file goes on as the one that was saved."""
    config = dataclasses.replace(config, log_dtype=log_dtype)
    inputs, more = draw_inputs(seed, **size), draw_inputs(seed + 1, **size)
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    with torch.no_grad():
        mask = flags(seed, masked, size["batch"], size["length"])
        state = fast_weight_memory(*inputs[:3], inputs.weights, config, mask=mask).state
        state.save(path)
        loaded = MemoryState.load(path, inputs.weights)
        want, have = (fast_weight_memory(*more[:3], x, config) for x in (state, loaded))
    assert torch.equal(have.output, want.output)
    assert torch.equal(dense(have.state), dense(want.state))
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]
    assert MemoryState.load(path, inputs.weights).config == config


@pytest.fixture
def saved(tmp_path) -> tuple[MemoryState, Inputs, Path]:
    config = MemoryConfig(topk=2, chunk_size=4)
    inputs = draw_inputs(3, 2, 10, 1, 9)
    state = fast_weight_memory(*inputs[:3], inputs.weights, config).state
    state.save(tmp_path / "state.safetensors")
    return state, inputs, tmp_path / "state.safetensors"


def test_a_damaged_file_is_refused(saved):
    """Any byte changed, anywhere, or any part missing: one line that names the file; never a wrong state."""
    _, inputs, path = saved
    content = path.read_bytes()
    for place in range(0, len(content), 131):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"state\.safetensors|expected|base is"):
            MemoryState.load(path, inputs.weights)
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"state\.safetensors is not a memory state, or damaged"):
            MemoryState.load(path, inputs.weights)


def test_a_foreign_file_is_refused(saved, tmp_path):
    state, inputs, path = saved
    other = FastWeights(inputs.keys, inputs.values + 1e-6)
    with pytest.raises(ValueError, match=r"base is .*; expected the fast weights that the state of .* started from"):
        MemoryState.load(path, other)
    with pytest.raises(ValueError, match=r"base is .*; expected the fast weights"):
        MemoryState.load(path, draw_inputs(3, 2, 10, 1, 8).weights)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"the format of .* is None; expected fwpkm.MemoryState"):
        MemoryState.load(path, inputs.weights)
    with pytest.raises(OSError, match="nowhere"):
        MemoryState.load(tmp_path / "nowhere", inputs.weights)
    loaded = dataclasses.replace(state.config, topk=3)
    state.save(path)
    with pytest.raises(ValueError, match=r"config is .*; expected the configuration of the state"):
        fast_weight_memory(*inputs[:3], MemoryState.load(path, inputs.weights), loaded)


def test_another_version_is_refused(saved):
    _, inputs, path = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"version": "2"})
    with pytest.raises(ValueError, match=r"the version of .* is 2; expected 1"):
        MemoryState.load(path, inputs.weights)


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    state, inputs, path = saved
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        fast_weight_memory(*inputs[:3], state, state.config).state.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_kill_while_saving_leaves_a_whole_file(saved, tmp_path):
    """Killed again and again while it saves two states in turn, a program leaves the one or the other."""
    _, inputs, path = saved
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.test_state import draw_inputs, fast_weight_memory, MemoryConfig
inputs = draw_inputs(3, 2, 10, 1, 9)
config = MemoryConfig(topk=2, chunk_size=4)
states = [fast_weight_memory(*inputs.tokens(0, n), inputs.weights, config).state for n in (4, 9)]
print("ready", flush=True)
while True:
    for state in states:
        state.save({str(path)!r})
"""
    for attempt in range(4):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.05 + 0.013 * attempt)
            process.send_signal(signal.SIGKILL)
        assert MemoryState.load(path, inputs.weights).position in (4, 9)


def test_memory_that_nobody_wrote_is_not_saved(tmp_path):
    """What stands behind a row's last record may be another's: it never reaches a file."""
    config = MemoryConfig(topk=1, chunk_size=4, key_update="slow")
    inputs = draw_inputs(0, 2, 12, 1, 9)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 3:] = False
    state = fast_weight_memory(*inputs[:3], inputs.weights, config, mask=mask).state
    state.log.records.tensors[2][1, 3:] = 12345.0
    state.save(tmp_path / "state")
    loaded = MemoryState.load(tmp_path / "state", inputs.weights)
    assert loaded.log.residuals.max() < 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.select([2]), r"indices is \[2\]; expected memories in \[0, 2\)"),
        (lambda s: s.select([[0]]), r"indices.shape is \[1, 1\]; expected \[M\]"),
        (lambda s: s.crop(-1), "tokens is -1; expected 0 to 10: the last 128 tokens can be taken back"),
        (lambda s: s.fold(), "memories is 2; expected 1"),
        (
            lambda s: dataclasses.replace(s, config=dataclasses.replace(s.config, scope="shared")).select([0]),
            "config.scope is 'shared'; expected 'sequence'",
        ),
    ],
)
def test_bad_use(saved, call, message):
    with pytest.raises(ValueError, match=message):
        call(saved[0])


def test_only_whole_chunks_are_forgotten():
    config = MemoryConfig(topk=2, chunk_size=4, key_update="slow")
    inputs = draw_inputs(3, 1, 10, 1, 9)
    with torch.no_grad():
        state = fast_weight_memory(*inputs[:3], inputs.weights, config).state
    flushed = state.flush()
    for first, last, edge in ((0, 2, 2), (3, 8, 3), (4, 9, 9)):
        with pytest.raises(
            ValueError, match=rf"records is \[{first}, {last}\]; expected whole chunks: .* across {edge}"
        ):
            forget(flushed, first, last)
    with pytest.raises(ValueError, match=r"records is \[4, 11\]; expected a range in the log's 10"):
        forget(flushed, 4, 11)
    with pytest.raises(ValueError, match="state is in an open chunk; expected one that was flushed"):
        forget(state, 0, 4)
    moved = fast_weight_memory(*inputs[:3], inputs.weights, dataclasses.replace(config, key_update="fast")).state
    with pytest.raises(ValueError, match="key_update is 'fast'; expected a memory whose keys stay"):
        forget(moved.flush(), 0, 4)
    assert forget(flushed, 4, 4) is flushed
    assert forget(flushed, 8, 10).committed == 8
