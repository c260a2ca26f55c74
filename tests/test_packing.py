"""Masks and packed sequences in ``fast_weight_memory``: the reference, and the laws of docs/design.md, section 2."""

import dataclasses
from itertools import pairwise
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fwpkm import MemoryConfig, MemoryState, fast_weight_memory, reference
from fwpkm.memory import COUNTS, KEY_UPDATES
from tests.draws import Draw, also, any_cuts, seeds
from tests.test_functional import OVERSHOT, Inputs, any_case, configs, dense, draw_inputs, sizes

MASKED, RESTARTS, LOG_DTYPES = [None, 0.0, 0.3, 0.8], [None, 0.0, 0.15, 0.5], ["float32", "float32", "bfloat16"]
masks, resets = st.sampled_from(MASKED), st.sampled_from(RESTARTS)
splits = st.lists(st.integers(1, 19), max_size=4)


def flags(seed: int, share: float | None, batch: int, length: int) -> Tensor | None:
    """``[B, T]``, True with a probability of ``share``; None for None."""
    return None if share is None else Draw(seed).uniform(batch, length) < share


def run(inputs: Inputs, config: MemoryConfig, cuts: list[int], **options: Any) -> tuple[Tensor, Any]:
    """One call for each piece between ``cuts``; ``mask`` and ``reset`` are cut too, a commit is at the end."""
    bounds = sorted({0, *cuts, inputs.query.shape[1]})
    memory, outputs = inputs.weights, []
    for start, stop in pairwise(bounds):
        own = {k: v[:, start:stop] if isinstance(v, Tensor) else v for k, v in options.items()}
        own["commit_partial"] = options.get("commit_partial", False) and stop == bounds[-1]
        result = fast_weight_memory(*inputs.tokens(start, stop), memory, config, **own)
        memory = result.state
        outputs.append(result.output)
    return torch.cat(outputs, 1), result


@also(
    60,
    **any_case,
    masked=MASKED,
    restarts=RESTARTS,
    cuts=lambda pick: any_cuts(pick) if pick.random() < 0.5 else [],
    training=[False, True],
    partial=[False, True],
    log_dtype=LOG_DTYPES,
)
@given(
    config=configs,
    seed=seeds,
    masked=masks,
    restarts=resets,
    cuts=splits,
    training=st.booleans(),
    partial=st.booleans(),
    log_dtype=st.sampled_from(LOG_DTYPES),
    **sizes,
)
def test_equals_the_reference(config, seed, masked, restarts, cuts, training, partial, log_dtype, **size):
    """Outputs, memory and gradients, in one call or several, of any mix of masked, packed and plain rows."""
    inputs = draw_inputs(seed, **size)
    config = dataclasses.replace(config, log_dtype=log_dtype)
    mask = flags(seed + 1, masked, size["batch"], size["length"])
    reset = flags(seed + 2, None if config.scope == "shared" else restarts, size["batch"], size["length"])
    options = {"mask": mask, "reset": reset, "training": training, "commit_partial": partial}
    cuts = [c for c in cuts if c < size["length"]]
    theirs, ours = inputs.leaves(), inputs.leaves()
    want = reference.fast_weight_memory(*theirs, config, **options)
    assume(want.output.abs().max() < OVERSHOT)
    output, result = run(ours, config, cuts, **options)
    assert_close(output, want.output)
    assert_close(dense(result.state.detach()), want.values)
    assert_close(result.state.keys.expand_as(want.keys), want.keys)
    if partial:
        position, commits = (result.state.per_memory(x) for x in (result.state.position, result.state.commits))
        assert torch.equal(commits, -(-position // config.chunk_size))
    slow = config.key_update == "slow" and not cuts
    if not cuts:
        assert torch.equal(result.slots, want.slots)
        assert_close(result.weights, want.weights)
        assert_close(result.addressing_loss, want.addressing_loss)
    if log_dtype == "bfloat16" and not training:
        return  # rounding is passed through by the operator, not by autograd
    weight = Draw(seed + 3).normal(*output.shape)
    have_grads = gradients((output * weight).sum() + (result.addressing_loss if slow else 0), ours)
    want_grads = gradients((want.output * weight).sum() + (want.addressing_loss if slow else 0), theirs)
    for name, have, expected in zip(Inputs._fields, have_grads, want_grads, strict=True):
        scale = expected.abs().max().clamp_min(1)
        assert_close(have / scale, expected / scale, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@given(
    seed=seeds,
    every=st.integers(1, 2),
    chunk_size=st.integers(1, 3),
    key_update=st.sampled_from(KEY_UPDATES),
    packed=st.booleans(),
    cuts=st.lists(st.integers(1, 15), min_size=1, max_size=3),
)
def test_gradients_are_cut_where_each_row_is_due(seed, every, chunk_size, key_update, packed, cuts):
    """``detach_every`` counts each row's own chunks, in one call as in several: keys, values and logs are cut there."""
    config = MemoryConfig(
        topk=2,
        chunk_size=chunk_size,
        lookahead=0,
        write_scale="exact",
        learning_rate=0.5,
        key_update=key_update,
        detach_every=every,
    )
    inputs = draw_inputs(seed, 2, 16, 1, 4)
    options: dict[str, Any] = {"mask": flags(seed + 1, 0.8, 2, 16), "training": True}
    if packed:
        options["reset"] = flags(seed + 2, 0.15, 2, 16)
    theirs, ours = inputs.leaves(), inputs.leaves()
    weight = Draw(seed + 3).normal(2, 16, 4)
    want = gradients((reference.fast_weight_memory(*theirs, config, **options).output * weight).sum(), theirs)
    have = gradients((run(ours, config, cuts, **options)[0] * weight).sum(), ours)
    for name, a, b in zip(Inputs._fields, have, want, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@given(config=configs, seed=seeds, masked=st.sampled_from([0.3, 0.8]), cuts=splits, **sizes)
def test_masked_tokens_of_a_shared_memory_do_not_count(config, seed, masked, cuts, **size):
    """All tokens on the same slots, so that every one that counts is counted in each of them."""
    config = dataclasses.replace(config, scope="shared", learning_rate=0.1)
    inputs = draw_inputs(seed, **size)
    inputs = inputs._replace(query=torch.zeros_like(inputs.query))
    mask = flags(seed + 1, masked, size["batch"], size["length"])
    want = reference.fast_weight_memory(*inputs, config, mask=mask, training=True)
    output, result = run(inputs, config, [c for c in cuts if c < size["length"]], mask=mask, training=True)
    assert_close(output, want.output)
    assert_close(dense(result.state), want.values)
    assert_close(result.state.keys.expand_as(want.keys), want.keys)


def gradients(loss: Tensor, leaves: Inputs) -> list[Tensor]:
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


@given(config=configs, seed=seeds, masked=st.sampled_from([0.3, 0.8]), left=st.booleans(), cuts=splits, **sizes)
def test_masked_is_removed(config, seed, masked, left, cuts, **size):
    """A row with masked positions, holding NaN, gives what its other tokens give alone; left padding included."""
    config = dataclasses.replace(config, scope="sequence")
    inputs = draw_inputs(seed, **size)
    mask = flags(seed + 1, masked, size["batch"], size["length"])
    if left:
        mask = mask.sort(dim=1).values
    poisoned = Inputs(
        torch.where(mask[..., None, None], inputs.query, torch.nan),
        torch.where(mask[..., None], inputs.target, torch.nan),
        torch.where(mask, inputs.gate, torch.nan),
        *inputs[3:],
    )
    output, result = run(poisoned, config, [c for c in cuts if c < size["length"]], mask=mask, training=True)
    assert not output[~mask].any()
    for row in range(size["batch"]):
        if mask[row].any():
            alone = Inputs(*(x[row, mask[row]].unsqueeze(0) for x in inputs[:3]), *inputs[3:])
            want = fast_weight_memory(*alone[:3], alone.weights, config, training=True)
            assume(want.output.abs().max() < OVERSHOT)
            assert_close(output[row, mask[row]], want.output[0])
            state = result.state if isinstance(result.state, MemoryState) else None
            assert_close(dense(state)[row], dense(want.state)[0])
            for name in COUNTS[:3]:  # the log may have been folded in one of the two
                assert getattr(state, name)[row] == getattr(want.state, name)


@also(20, **any_case, cut=range(1, 20))
@given(config=configs, seed=seeds, cut=st.integers(1, 19), **sizes)
def test_a_mask_may_come_later(config, seed, cut, **size):
    """A memory that has read whole rows goes on with masked ones, in the middle of a chunk too."""
    config, size["length"] = dataclasses.replace(config, scope="sequence"), 20
    inputs = draw_inputs(seed, **size)
    mask = flags(seed + 1, 0.6, size["batch"], 20)
    mask[:, :cut] = True
    want = reference.fast_weight_memory(*inputs, config, mask=mask)
    assume(want.output.abs().max() < OVERSHOT)
    with torch.no_grad():
        first = fast_weight_memory(*inputs.tokens(0, cut), inputs.weights, config)
        second = fast_weight_memory(*inputs.tokens(cut, 20), first.state, config, mask=mask[:, cut:])
    assert_close(torch.cat((first.output, second.output), 1), want.output)
    assert_close(dense(second.state), want.values)
    assert_close(second.state.keys.expand_as(want.keys), want.keys)


@given(config=configs, seed=seeds, restarts=st.sampled_from([0.15, 0.5]), cuts=splits, **sizes)
def test_packed_is_separate(config, seed, restarts, cuts, **size):
    """Sequences packed into a row, in any number of calls, give what each gives alone."""
    config = dataclasses.replace(config, scope="sequence")
    inputs = draw_inputs(seed, **size)
    reset = flags(seed + 2, restarts, size["batch"], size["length"])
    output, result = run(inputs, config, [c for c in cuts if c < size["length"]], reset=reset, training=True)
    for row in range(size["batch"]):
        bounds = sorted({0, size["length"], *reset[row].nonzero().flatten().tolist()})
        for start, stop in pairwise(bounds):
            alone = Inputs(*(x[row : row + 1, start:stop] for x in inputs[:3]), *inputs[3:])
            want = fast_weight_memory(*alone[:3], alone.weights, config, training=True)
            assume(want.output.abs().max() < OVERSHOT)
            assert_close(output[row, start:stop], want.output[0])
        assert_close(dense(result.state)[row], dense(want.state)[0])
        assert_close(result.state.keys.expand(size["batch"], *inputs.keys.shape)[row], want.state.keys[0])


@given(seed=seeds, key_update=st.sampled_from(["fast", "slow"]), reset_at=st.integers(1, 59))
def test_a_row_restarts_after_its_log_was_folded(seed, key_update, reset_at):
    """Folded values belong to the old sequence only: a new one starts from the base again."""
    config = MemoryConfig(topk=2, chunk_size=4, write_scale="exact", key_update=key_update)
    inputs, more = draw_inputs(seed, 2, 60, 1, 4), draw_inputs(seed + 1, 2, 60, 1, 4)
    mask = torch.ones(2, 60, dtype=torch.bool)
    with torch.no_grad():
        state = run(inputs, config, list(range(10, 60, 10)), mask=mask)[1].state
        assert state.own_values is not None
        reset = torch.zeros(2, 60, dtype=torch.bool)
        reset[1, reset_at] = True
        result = fast_weight_memory(*more[:3], state, config, reset=reset)
    both = Inputs(*(torch.cat(pair, 1) for pair in zip(inputs[:3], more[:3], strict=True)), *inputs[3:])
    whole = torch.cat((torch.zeros_like(reset), reset), 1)
    want = reference.fast_weight_memory(*both, config, reset=whole)
    assert_close(result.output, want.output[:, 60:])
    assert_close(dense(result.state), want.values)
