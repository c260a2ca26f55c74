"""The reference's masks, packed sequences and rounded log against the plain call, by hand, on what is not masked."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fwpkm import reference
from tests.draws import Draw, seeds
from tests.test_reference import assert_close, assert_same_result, make_config, make_inputs, problems

PER_TOKEN = ("output", "slots", "weights")


def poisoned(inputs, mask):
    """The inputs with NaN wherever `mask` is False, so that whatever looks there shows."""
    hole = ~mask
    return [x.masked_fill(hole.view(*hole.shape, *[1] * (x.dim() - 2)), torch.nan) for x in inputs[:3]] + inputs[3:]


def alone(inputs, row, columns, config, **options):
    """The plain call on these columns of this row, and how many chunks it committed."""
    tokens = [x[row : row + 1, columns] for x in inputs[:3]]
    keys = inputs[3][row] if inputs[3].dim() == 5 else inputs[3]
    result = reference.fast_weight_memory(*tokens, keys, inputs[4], config, **options)
    whole, rest = divmod(len(columns), config.chunk_size)
    return result, whole + bool(rest and options.get("commit_partial"))


def mean_loss(parts):
    """The mean over chunks from `(result, number of chunks)` of calls."""
    total = sum(n for _, n in parts)
    return sum(n * result.addressing_loss for result, n in parts) / total if total else torch.tensor(0.0).double()


def holes(draw, B, T):
    """Masks of several kinds, one a row: padded left, padded right, holes anywhere, nothing but padding, none."""
    mask, columns = torch.ones(B, T, dtype=torch.bool), torch.arange(T)
    for b in range(B):
        kind, length = int(draw.integers(5)), int(draw.integers(T + 1))
        masks = columns >= length, columns < length, draw.uniform(T) < 0.6, columns < 0, columns >= 0
        mask[b] = masks[kind]
    return mask


# Scope "sequence"


@given(problems(max_length=9, scope="sequence"), seeds, st.booleans(), st.booleans())
def test_masked_is_removed(problem, seed, training, commit_partial):
    inputs, config = problem
    draw = Draw(seed)
    mask = holes(draw, *inputs[2].shape)
    inputs[3] = inputs[3] + draw.normal(len(mask), *inputs[3].shape)  # each row its own keys
    options = {"training": training, "commit_partial": commit_partial}
    result = reference.fast_weight_memory(*poisoned(inputs, mask), config, mask=mask, **options)
    parts = []
    for b in range(len(mask)):
        part = alone(inputs, b, mask[b].nonzero().flatten(), config, **options)
        parts.append(part)
        for name in PER_TOKEN:
            x = getattr(result, name)[b]
            assert_close(x[mask[b]], getattr(part[0], name)[0])
            assert not x[~mask[b]].any()
        assert_close(result.keys[b], part[0].keys[0])
        assert_close(result.values[b], part[0].values[0])
    assert_close(result.addressing_loss, mean_loss(parts))


def packed_row(draw, T):
    """The columns of each document of a row, and the row's resets: anywhere in the padding before a document."""
    columns = (draw.uniform(T) < 0.7).nonzero().flatten().tolist()
    documents, reset, last = [[]], torch.zeros(T, dtype=torch.bool), -1
    for t in columns:
        if draw.uniform(1) < 0.4:
            reset[last + 1 + int(draw.integers(t - last)) : t + 1 : 2] = True  # once or again and again
            if documents[-1]:
                documents.append([])
        documents[-1].append(t)
        last = t
    if last < T - 1 and draw.uniform(1) < 0.4:
        reset[last + 1 + int(draw.integers(T - 1 - last))] = True
        if documents[-1]:
            documents.append([])
    return documents, reset


def packed_batch(draw, B, T):
    documents, resets = zip(*(packed_row(draw, T) for _ in range(B)), strict=True)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b, row in enumerate(documents):
        mask[b, [t for document in row for t in document]] = True
    return documents, mask, torch.stack(resets)


@given(problems(max_length=12, scope="sequence"), seeds, st.booleans(), st.booleans())
def test_packed_is_separate(problem, seed, training, commit_partial):
    """Every document starts at the memory passed in; the last one of a row is what the result keeps."""
    inputs, config = problem
    draw = Draw(seed)
    documents, mask, reset = packed_batch(draw, *inputs[2].shape)
    inputs[3] = inputs[3] + draw.normal(len(mask), *inputs[3].shape)
    result = reference.fast_weight_memory(
        *poisoned(inputs, mask), config, training=training, commit_partial=commit_partial, mask=mask, reset=reset
    )
    parts = []
    for b, row in enumerate(documents):
        for i, columns in enumerate(row):
            partial = commit_partial and i == len(row) - 1
            part = alone(inputs, b, columns, config, training=training, commit_partial=partial)
            parts.append(part)
            for name in PER_TOKEN:
                assert_close(getattr(result, name)[b, columns], getattr(part[0], name)[0])
        assert_close(result.keys[b], part[0].keys[0])
        assert_close(result.values[b], part[0].values[0])
    for name in PER_TOKEN:
        assert not getattr(result, name)[~mask].any()
    assert_close(result.addressing_loss, mean_loss(parts))


def test_a_reset_after_the_last_token_leaves_a_fresh_memory():
    inputs, config = make_inputs(B=2, T=6), make_config()
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 5] = True
    result = reference.fast_weight_memory(*inputs, config, commit_partial=True, mask=mask, reset=reset)
    assert torch.equal(result.keys[0], inputs[3])
    assert torch.equal(result.values[0], inputs[4])
    plain = reference.fast_weight_memory(*inputs, config)
    assert_close(result.output[0, :4], plain.output[0, :4])
    assert_close(result.values[1], plain.values[1])
    losses = [alone(inputs, 0, range(3), config), alone(inputs, 1, range(6), config)]  # row 0: one chunk committed
    assert_close(result.addressing_loss, mean_loss(losses))


def test_without_a_token_nothing_commits():
    inputs, mask = make_inputs(T=4), torch.zeros(2, 4, dtype=torch.bool)
    result = reference.fast_weight_memory(*poisoned(inputs, mask), make_config(), commit_partial=True, mask=mask)
    assert not any(x.any() for x in result[:3])
    assert torch.equal(result.keys, inputs[3].expand_as(result.keys))
    assert torch.equal(result.values, inputs[4].expand_as(result.values))
    assert result.addressing_loss == 0


@pytest.mark.parametrize("detach_every", [None, 1, 2])
def test_detach_every_counts_the_chunks_of_each_packed_sequence(detach_every):
    config = make_config(chunk_size=2, detach_every=detach_every)
    documents = [0, 1, 3], [5, 6, 7, 9, 10, 11]  # one chunk and an open one, then three
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, documents[0] + documents[1]] = True
    reset = torch.zeros_like(mask)
    reset[0, 4] = True

    def gradients(outputs):
        leaves = [x.requires_grad_() for x in make_inputs(B=1, T=12)]
        loss = outputs(leaves)
        return torch.autograd.grad(loss.square().sum(), leaves, allow_unused=True, materialize_grads=True)

    packed = gradients(lambda x: reference.fast_weight_memory(*x, config, mask=mask, reset=reset).output)
    separate = gradients(lambda x: torch.cat([alone(x, 0, columns, config)[0].output for columns in documents], dim=1))
    for got, want in zip(packed, separate, strict=True):
        assert_close(got, want)


# Scope "shared"


def shared_by_loops(inputs, config, mask, training, commit_partial):
    """A memory that the batch shares, token by token, in which a masked one is not there."""
    query, target, gate, keys, values = inputs
    (B, T), H, n, C = gate.shape, query.shape[2], keys.shape[2], config.chunk_size
    output, w, losses = torch.zeros_like(target), torch.zeros(B, T, H * config.topk).double(), []
    slots = torch.zeros_like(w).long()
    for start in range(0, T, C):
        columns = range(start, min(start + C, T))
        tokens = [(b, t) for b, t in product(range(B), columns) if mask[b, t]]
        reads, use, sub_slots = torch.zeros(n * n), torch.zeros(2, n).double(), {}
        for b, t in tokens:
            address = reference.product_key_address(
                query[b, t][None, None], keys[None], config.topk, config.score, config.score_eps
            )
            scores, slot, sub_scores, sub_slots[b, t] = (x[0, 0] for x in address)
            slots[b, t], w[b, t] = slot.flatten(), reference.weights(scores, config.temperature, config.nonlinearity)
            for j, s in enumerate(slots[b, t].tolist()):
                output[b, t] += w[b, t, j] * values[s]
                reads[s] += 1
            for h, a, j in product(range(H), range(2), range(config.topk)):
                use[a, sub_slots[b, t][h, a, j]] += sub_scores[h, a].softmax(-1)[j] / (H * len(tokens))
        if len(columns) < C and not commit_partial:
            break

        version = values.clone()
        for b, t in tokens:
            if t + config.lookahead in columns and mask[b, t + config.lookahead]:
                residual = gate[b, t] * (target[b, t + config.lookahead] - output[b, t])
                if config.log_dtype == "bfloat16" and not training:
                    residual = residual.bfloat16().double()
                scale = reference.write_scale(w[b, t], config.write_scale, len(columns), config.lookahead)
                for j, s in enumerate(slots[b, t].tolist()):
                    version[s] += config.learning_rate * scale * w[b, t, j] / reads[s] * residual
        values = version
        losses.append((use * torch.log(use + 1e-8)).sum())
        if tokens and (config.key_update == "fast" or (config.key_update == "train_only" and training)):
            q, chosen = (torch.stack([x[token] for token in tokens])[None] for x in (query, sub_slots))
            rate = config.learning_rate * config.addressing_weight
            keys = reference.key_commit(q, keys[None], None, chosen, None, rate, config.score, config.score_eps)[0]
    loss = torch.stack(losses).mean() if losses else torch.tensor(0.0).double()
    return reference.Result(output, slots, w, keys[None], values[None], loss)


@given(
    problem=problems(max_length=9, scope="shared"),
    seed=seeds,
    log_dtype=st.sampled_from(["float32", "bfloat16"]),
    training=st.booleans(),
    commit_partial=st.booleans(),
)
@example((make_inputs(T=5), make_config(scope="shared")), 0, "float32", False, True)
@example((make_inputs(T=9, n=2), make_config(scope="shared", lookahead=2)), 1, "bfloat16", False, False)
def test_a_shared_memory_leaves_masked_tokens_out(problem, seed, log_dtype, training, commit_partial):
    inputs, config = problem
    config = SimpleNamespace(**{**vars(config), "log_dtype": log_dtype})
    draw = Draw(seed)
    mask = holes(draw, *inputs[2].shape)
    start = int(draw.integers(mask.shape[1]))
    mask[:, start : start + int(draw.integers(2 * config.chunk_size))] = False  # often a chunk without a token
    expected = shared_by_loops(inputs, config, mask, training, commit_partial)
    assert_same_result(
        reference.fast_weight_memory(*poisoned(inputs, mask), config, None, training, commit_partial, mask), expected
    )


def test_a_shared_chunk_without_a_token_commits_nothing_and_counts():
    inputs, config = make_inputs(T=6), make_config(scope="shared")
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 3:] = False
    result = reference.fast_weight_memory(*poisoned(inputs, mask), config, mask=mask)
    first = reference.fast_weight_memory(*(x[:, :3] for x in inputs[:3]), *inputs[3:], config)
    assert_close(result.keys, first.keys)
    assert_close(result.values, first.values)
    assert_close(result.addressing_loss, first.addressing_loss / 2)


# Either scope


@given(problems(max_length=9), st.booleans(), st.booleans())
def test_a_mask_of_tokens_only_is_no_mask(problem, training, commit_partial):
    inputs, config = problem
    mask = torch.ones_like(inputs[2], dtype=torch.bool)
    plain = reference.fast_weight_memory(*inputs, config, None, training, commit_partial)
    assert_same_result(reference.fast_weight_memory(*inputs, config, None, training, commit_partial, mask), plain)


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_no_gradient_reaches_or_comes_from_a_masked_token(scope):
    mask = torch.tensor([[False, True, True, False, True, True, True], [True, True, False, True, True, False, True]])
    leaves = [x.requires_grad_() for x in poisoned(make_inputs(), mask)]
    result = reference.fast_weight_memory(*leaves, make_config(scope=scope), training=True, mask=mask)
    gradients = torch.autograd.grad(sum(x.square().sum() for x in (result.output, result.keys, result.values)), leaves)
    assert all(x.isfinite().all() and x.any() for x in gradients)
    assert not any(x[~mask].any() for x in gradients[:3])


@given(problems(max_length=8))
def test_a_bfloat16_log_rounds_the_residuals(problem):
    """Only they are rounded, when they are created: not what is read, and not the product with the coefficients."""
    inputs, config = problem
    _, target, gate, _, values = inputs
    (B, T), L = gate.shape, config.lookahead
    config.chunk_size = T
    exact = reference.fast_weight_memory(*inputs, config)
    rounded = reference.fast_weight_memory(*inputs, SimpleNamespace(**{**vars(config), "log_dtype": "bfloat16"}))
    assert_same_result(rounded._replace(values=exact.values), exact)
    expected = []
    for rows in [range(B)] if config.scope == "shared" else [[b] for b in range(B)]:
        version = values.clone()
        counts = torch.bincount(exact.slots[rows].flatten(), minlength=len(values))
        for b, t in product(rows, range(max(T - L, 0))):
            w, slots = exact.weights[b, t], exact.slots[b, t]
            residual = (gate[b, t] * (target[b, t + L] - exact.output[b, t])).bfloat16().double()
            coefficients = config.learning_rate * reference.write_scale(w, config.write_scale, T, L) * w / counts[slots]
            for c, s in zip(coefficients, slots.tolist(), strict=True):
                version[s] += c * residual
        expected.append(version)
    assert_close(rounded.values, torch.stack(expected))


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_a_bfloat16_log_shows_in_later_reads_and_not_in_training(scope):
    inputs = make_inputs(T=9)
    options = {"scope": scope, "key_update": "slow"}
    exact = reference.fast_weight_memory(*inputs, make_config(**options))
    rounded = reference.fast_weight_memory(*inputs, make_config(log_dtype="bfloat16", **options))
    difference = (rounded.output - exact.output).abs()
    assert not difference[:, :3].any()
    assert 1e-6 < difference[:, 3:].max() < 0.1
    trained = reference.fast_weight_memory(*inputs, make_config(log_dtype="bfloat16", **options), training=True)
    assert_same_result(trained, exact)


# Bad input


@pytest.mark.parametrize("name", ["mask", "reset"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2, 6, dtype=torch.bool), r"shape is \[2, 6\]; expected \[2, 7\]"),
        (torch.ones(7, dtype=torch.bool), r"shape is \[7\]; expected \[2, 7\]"),
        (torch.ones(2, 7), "dtype is torch.float32; expected torch.bool"),
        (torch.ones(2, 7, dtype=torch.int64), "dtype is torch.int64; expected torch.bool"),
    ],
    ids=["length", "dimensions", "float", "integer"],
)
def test_masks_of_other_shapes_or_dtypes_are_refused(name, given, message):
    with pytest.raises(ValueError, match=f"{name}.{message}"):
        reference.fast_weight_memory(*make_inputs(), make_config(), **{name: given})


@pytest.mark.parametrize("name", ["mask", "reset"])
def test_chunk_lengths_and_masks_are_refused_together(name):
    given = torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"chunk_lengths is \[3, 4\]; expected None with {name}"):
        reference.fast_weight_memory(*make_inputs(), make_config(), chunk_lengths=[3, 4], **{name: given})


def test_a_reset_of_a_shared_memory_is_refused():
    reset = torch.zeros(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="reset is given; expected None with scope 'shared'"):
        reference.fast_weight_memory(*make_inputs(), make_config(scope="shared"), reset=reset)


@pytest.mark.parametrize("training", [False, True])
def test_unknown_log_dtypes_are_refused(training):
    with pytest.raises(ValueError, match="log_dtype is 'float16'"):
        reference.fast_weight_memory(*make_inputs(), make_config(log_dtype="float16"), training=training)
