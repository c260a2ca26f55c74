"""The laws of ``fast_weight_memory`` (docs/design.md, section 2), and the reference, on random configurations."""

import dataclasses
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fwpkm import FastWeights, MemoryConfig, MemoryState, fast_weight_memory, reference
from fwpkm.memory import KEY_UPDATES, NONLINEARITIES, SCOPES, WRITE_SCALES
from tests.draws import Draw, also, any_cuts, any_seed, choose, seeds

OPTIONS = {
    "topk": range(1, 5),
    "chunk_size": range(1, 8),
    "lookahead": range(3),
    "learning_rate": [0.5, 1.0],
    "write_scale": WRITE_SCALES,
    "score": ["idw", "dot"],
    "temperature": [0.7, 1.0],
    "nonlinearity": NONLINEARITIES,
    "key_update": KEY_UPDATES,
    "scope": SCOPES,
    "detach_every": [None, None, 1, 2],
}
SIZES = {"batch": range(1, 4), "length": range(1, 21), "heads": range(1, 3), "n": range(4, 6)}
configs = st.builds(MemoryConfig, **{name: st.sampled_from(values) for name, values in OPTIONS.items()})
sizes = {name: st.sampled_from(values) for name, values in SIZES.items()}
any_case = {"config": lambda pick: MemoryConfig(**choose(pick, OPTIONS)), "seed": any_seed} | SIZES


OVERSHOT = 1e3  # a write scale that overshoots makes numbers grow without bound, and rounding with them


class Inputs(NamedTuple):
    query: Tensor
    target: Tensor
    gate: Tensor
    keys: Tensor
    values: Tensor

    @property
    def weights(self) -> FastWeights:
        return FastWeights(self.keys, self.values)

    def tokens(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x[:, start:stop] for x in self[:3])

    def rows(self, index: Any) -> "Inputs":
        return self._replace(**{name: getattr(self, name)[index] for name in ("query", "target", "gate")})

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) for x in self))

    def leaves(self) -> "Inputs":
        return Inputs(*(x.clone().requires_grad_() for x in self))


def draw_inputs(seed: int, batch: int, length: int, heads: int, n: int, hot: bool = False) -> Inputs:
    draw, half, width = Draw(seed), 3, 4
    query = draw.normal(1 if hot else batch, 1 if hot else length, heads, 2 * half).expand(batch, length, -1, -1)
    keys, values = draw.normal(heads, 2, n, half), draw.normal(n * n, width)
    return Inputs(query.clone(), draw.normal(batch, length, width), draw.uniform(batch, length), keys, values)


def run(inputs: Inputs, config: MemoryConfig, cuts: list[int] | None = None, **options: Any):
    """One pass, or one call for each piece between ``cuts``: outputs and the last result."""
    memory, outputs, result = inputs.weights, [], None
    bounds = sorted({0, *(cuts or []), inputs.query.shape[1]})
    for start, stop in pairwise(bounds):
        result = fast_weight_memory(*inputs.tokens(start, stop), memory, config, **options)
        memory = result.state
        outputs.append(result.output)
    return torch.cat(outputs, 1), result


def dense(state: MemoryState) -> Tensor:
    """The values of all memories, ``[M, N, Dv]``."""
    return state.dense_values().view(state.memories, state.n_slots, -1)


@also(30, **any_case, training=[False, True], partial=[False, True])
@given(config=configs, seed=seeds, training=st.booleans(), partial=st.booleans(), **sizes)
def test_equals_the_reference(config, seed, training, partial, **size):
    inputs = draw_inputs(seed, **size)
    want = reference.fast_weight_memory(*inputs, config, training=training, commit_partial=partial)
    have = fast_weight_memory(*inputs[:3], inputs.weights, config, training=training, commit_partial=partial)
    assert_close(have.output, want.output)
    assert torch.equal(have.slots, want.slots)
    assert_close(have.weights, want.weights)
    assert_close(have.addressing_loss, want.addressing_loss)
    assert_close(have.state.keys.expand_as(want.keys), want.keys)
    assert_close(dense(have.state), want.values)


@also(30, **any_case)
@given(config=configs, seed=seeds, **sizes)
def test_gradients_equal_the_reference(config, seed, **size):
    inputs = draw_inputs(seed, **size)
    weight = Draw(seed + 1).normal(*inputs.target.shape)
    slow = config.key_update == "slow"

    def gradients(function) -> tuple[Tensor, ...]:
        leaves = inputs.leaves()
        output, loss = function(leaves)
        total = (output * weight).sum() + (loss if slow else 0)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))

    def ours(leaves: Inputs) -> tuple[Tensor, Tensor]:
        output, result = run(leaves, config, training=True)
        assert slow or not result.addressing_loss.requires_grad
        return output, result.addressing_loss

    def theirs(leaves: Inputs) -> tuple[Tensor, Tensor]:
        result = reference.fast_weight_memory(*leaves, config, training=True)
        return result.output, result.addressing_loss

    for name, have, want in zip(Inputs._fields, gradients(ours), gradients(theirs), strict=True):
        assert_close(have, want, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"gradient of {name}: {m}")


@also(30, **any_case, cuts=any_cuts, training=[False, True])
@given(config=configs, seed=seeds, cuts=st.lists(st.integers(1, 19), max_size=8), training=st.booleans(), **sizes)
def test_streaming(config, seed, cuts, training, **size):
    """However a sequence is cut into calls, outputs, memory and gradients are the same."""
    size["length"] = max(size["length"], 2)
    cuts = [c for c in cuts if c < size["length"]]
    inputs = draw_inputs(seed, **size)
    results = []
    for pieces in ([], cuts):
        leaves = inputs.leaves()
        output, last = run(leaves, config, pieces, training=training)
        assume(output.abs().max() < OVERSHOT)
        grads = torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True)
        results.append((output, last.state.detach(), grads))
    (output, state, grads), (pieces_output, pieces_state, pieces_grads) = results
    assert_close(pieces_output, output)
    assert_close(dense(pieces_state), dense(state))
    assert_close(pieces_state.keys, state.keys)
    assert (pieces_state.position, pieces_state.commits) == (state.position, state.commits)
    for have, want in zip(pieces_grads, grads, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            assert_close(have, want, rtol=1e-7, atol=1e-9)


@given(config=configs, seed=seeds, cuts=st.lists(st.integers(1, 19), min_size=1, max_size=4), **sizes)
def test_losses_of_calls_are_those_of_one(config, seed, cuts, **size):
    """Each chunk's addressing loss is counted once, in the call that commits it, with all of its tokens."""
    size["length"] = max(size["length"], 2)
    inputs = draw_inputs(seed, **size)
    memory, total, commits = inputs.weights, 0.0, 0
    for start, stop in pairwise(sorted({0, *(c for c in cuts if c < size["length"]), size["length"]})):
        result = fast_weight_memory(*inputs.tokens(start, stop), memory, config, training=True)
        memory, new = result.state, result.state.commits - commits
        total, commits = total + new * result.addressing_loss, commits + new
    want = reference.fast_weight_memory(*inputs, config, training=True)
    assert_close(torch.as_tensor(total, dtype=torch.float64), commits * want.addressing_loss)


@given(config=configs, seed=seeds, **sizes)
def test_isolation_and_batch_permutation(config, seed, **size):
    """In the ``sequence`` scope a sequence alone gives what it gives in any batch, in any place."""
    config = dataclasses.replace(config, scope="sequence")
    inputs = draw_inputs(seed, **size)
    together = fast_weight_memory(*inputs[:3], inputs.weights, config, training=True)
    order = torch.randperm(size["batch"], generator=Draw(seed).generator)
    permuted = fast_weight_memory(*inputs.rows(order)[:3], inputs.weights, config, training=True)
    assert_close(permuted.output, together.output[order])
    for row in range(size["batch"]):
        alone = fast_weight_memory(*inputs.rows(slice(row, row + 1))[:3], inputs.weights, config, training=True)
        assert_close(alone.output, together.output[row : row + 1])
        assert_close(dense(alone.state)[0], dense(together.state)[row])


@given(config=configs, seed=seeds, **sizes)
def test_learning_rate_zero_changes_nothing(config, seed, **size):
    config = dataclasses.replace(config, learning_rate=0.0)
    inputs = draw_inputs(seed, **size)
    result = fast_weight_memory(*inputs[:3], inputs.weights, config, training=True)
    assert torch.equal(dense(result.state), inputs.values.expand_as(dense(result.state)))
    assert torch.equal(result.state.keys, inputs.keys.expand_as(result.state.keys))
    assert_close(result.output, reference.memory_read(inputs.values, result.slots, result.weights))


@given(config=configs, seed=seeds, **sizes)
def test_the_starting_point_is_not_touched(config, seed, **size):
    inputs = draw_inputs(seed, **size)
    before = [x.clone() for x in inputs]
    result = fast_weight_memory(*inputs[:3], inputs.weights, config, commit_partial=True, training=True)
    fast_weight_memory(*inputs[:3], result.state, config, training=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@given(config=configs, seed=seeds, **sizes)
def test_continuing_a_state_twice_gives_the_same(config, seed, **size):
    inputs, more = draw_inputs(seed, **size), draw_inputs(seed + 1, **size)
    state = fast_weight_memory(*inputs[:3], inputs.weights, config).state
    first, again = (fast_weight_memory(*more[:3], state, config) for _ in range(2))
    assert torch.equal(first.output, again.output)
    assert torch.equal(dense(first.state), dense(again.state))


@given(seed=seeds, heads=st.integers(1, 2), score=st.sampled_from(["idw", "dot"]), topk=st.integers(1, 4))
def test_exact_rewrite(seed, heads, score, topk):
    """An ``exact`` write that collides with no other, at gate and rate 1, makes the next read return its target."""
    config = MemoryConfig(topk, chunk_size=1, lookahead=0, write_scale="exact", score=score, key_update="slow")
    inputs = draw_inputs(seed, 2, 2, heads, 5)
    inputs = inputs._replace(query=inputs.query[:, :1].expand(-1, 2, -1, -1), gate=torch.ones(2, 2).double())
    result = fast_weight_memory(*inputs[:3], inputs.weights, config)
    slots = result.slots[:, 0].sort().values
    lone = (slots.diff() != 0).all(-1)  # with several heads an address can name a slot twice
    assert_close(result.output[lone, 1], inputs.target[lone, 0])


@given(config=configs, seed=seeds, **sizes)
def test_hot_row(config, seed, **size):
    """All tokens of a chunk on the same slots: what is added is an average, in any number of tokens."""
    config = dataclasses.replace(config, chunk_size=size["length"], key_update="slow", scope="sequence")
    inputs = draw_inputs(seed, **size, hot=True)
    result = fast_weight_memory(*inputs[:3], inputs.weights, config)
    want = reference.fast_weight_memory(*inputs, config)
    assert_close(dense(result.state), want.values)
    if config.write_scale == "paper" and config.nonlinearity == "softmax" and size["heads"] == 1:
        largest = (inputs.gate.unsqueeze(-1) * (inputs.target.roll(-config.lookahead, 1) - result.output)).abs().amax()
        assert (dense(result.state) - inputs.values).abs().amax() <= config.learning_rate * largest + 1e-9


@given(config=configs, seed=seeds, flushes=st.lists(st.integers(1, 19), min_size=1, max_size=3), **sizes)
def test_flush(config, seed, flushes, **size):
    """An early flush commits the open chunk with its own length; boundaries then count from there."""
    inputs = draw_inputs(seed, **size)
    config = dataclasses.replace(config, detach_every=None)
    state, outputs, start, chunks = inputs.weights, [], 0, []
    for stop in sorted({f for f in flushes if f < size["length"]} | {size["length"]}):
        result = fast_weight_memory(*inputs.tokens(start, stop), state, config, training=True)
        state = result.state.flush() if config.key_update == "fast" or result.state.open else result.state
        assert state.open is None
        outputs.append(result.output)
        whole, rest = divmod(stop - start, config.chunk_size)
        chunks += [config.chunk_size] * whole + [rest] * (rest > 0)
        start = stop
    want = reference.fast_weight_memory(*inputs, config, chunk_lengths=chunks, training=True)
    assert_close(torch.cat(outputs, 1), want.output)
    assert_close(dense(state), want.values)
    assert_close(state.keys.expand_as(want.keys), want.keys)
    assert state.commits == len(chunks)


@given(config=configs, seed=seeds, **sizes)
def test_fold(config, seed, **size):
    """The dense weights of a state stand for what it has committed: reading on from them gives the same."""
    config = dataclasses.replace(config, scope="sequence")
    size["batch"] = 1
    inputs, more = draw_inputs(seed, **size), draw_inputs(seed + 1, **size)
    state = fast_weight_memory(*inputs[:3], inputs.weights, config, commit_partial=True).state
    folded = state.fold()
    assert folded.values.data_ptr() != inputs.values.data_ptr()
    want = fast_weight_memory(*more[:3], state, config).output
    assert_close(fast_weight_memory(*more[:3], folded, config).output, want)


@given(seed=seeds, scope=st.sampled_from(SCOPES), key_update=st.sampled_from(KEY_UPDATES))
def test_a_long_log_folds_into_rows(seed, scope, key_update):
    """A log that outgrows the dense values is folded into the memories' own; nothing else changes."""
    config = MemoryConfig(topk=2, chunk_size=4, scope=scope, key_update=key_update, write_scale="exact")
    inputs = draw_inputs(seed, 2, 120, 1, 4)
    with torch.no_grad():
        output, result = run(inputs, config, list(range(10, 120, 10)))
    assert result.state.values.data_ptr() != inputs.values.data_ptr()
    records = 0 if result.state.log is None else result.state.log.slots.shape[1]
    assert records < 60
    want = reference.fast_weight_memory(*inputs, config)
    assert_close(output, want.output)
    assert_close(dense(result.state), want.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_whatever_comes_in(dtype):
    """Half-precision inputs and autocast change the inputs' rounding, not the arithmetic."""
    config = MemoryConfig(topk=2, chunk_size=4)
    inputs = draw_inputs(0, 2, 12, 1, 5).to(torch.float32)
    rounded = inputs._replace(**{k: getattr(inputs, k).to(dtype) for k in ("query", "target", "gate")})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = fast_weight_memory(*rounded[:3], inputs.weights, config)
    want = fast_weight_memory(*(x.float() for x in rounded[:3]), inputs.weights, config)
    assert have.output.dtype == torch.float32
    assert torch.equal(have.output, want.output)


def test_float32_within_tolerance_at_a_larger_size():
    config = MemoryConfig(topk=8, chunk_size=64)
    draw = Draw(0, torch.float32)
    n, width = 32, 64
    keys = (draw.uniform(1, 2, n, width // 2) * 2 - 1) * width**-0.5
    inputs = Inputs(
        draw.normal(2, 256, 1, width), draw.normal(2, 256, width), draw.uniform(2, 256), keys, draw.normal(n * n, width)
    )
    wide = inputs.to(torch.float64)
    have = fast_weight_memory(*inputs[:3], inputs.weights, config)
    want = fast_weight_memory(*wide[:3], wide.weights, config)
    same = (have.slots == want.slots).all(-1)
    assert same.float().mean() > 0.98  # float32 ties aside
    first = same[:, :64]  # later chunks see what differs in earlier ones
    assert_close(have.output[:, :64][first].double(), want.output[:, :64][first], rtol=1e-5, atol=1e-5)


def test_training_scope_of_key_commits():
    config = MemoryConfig(topk=2, chunk_size=4, key_update="train_only")
    inputs = draw_inputs(0, 1, 8, 1, 4)
    start = inputs.weights
    assert torch.equal(fast_weight_memory(*inputs[:3], start, config).state.keys[0], inputs.keys)
    moved = fast_weight_memory(*inputs[:3], start, config, training=True).state.keys[0]
    assert not torch.allclose(moved, inputs.keys)
    half = fast_weight_memory(*inputs.tokens(0, 2), start, config).state
    with pytest.raises(ValueError, match="training is True; expected the same for all tokens of a chunk"):
        fast_weight_memory(*inputs.tokens(2, 4), half, config, training=True)
    half_trained = fast_weight_memory(*inputs.tokens(0, 2), start, config, training=True).state
    with pytest.raises(ValueError, match="training is False; expected the same for all tokens of a chunk"):
        fast_weight_memory(*inputs.tokens(2, 4), half_trained, config)
    flushed = half.flush()
    assert fast_weight_memory(*inputs.tokens(2, 4), flushed, config, training=True).state.commits == 1
