"""The reference against laws, plain Python loops and finite differences; no other implementation takes part."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fwpkm import reference

SCALES = ("reference", "paper", "exact")
SCORES = ("idw", "dot")


def make_config(**options):
    defaults = {
        "topk": 2,
        "chunk_size": 3,
        "lookahead": 1,
        "learning_rate": 1.0,
        "write_scale": "reference",
        "score": "idw",
        "score_eps": 1e-3,
        "temperature": 1.0,
        "nonlinearity": "softmax",
        "addressing_weight": 1.0,
        "key_update": "fast",
        "scope": "sequence",
        "detach_every": None,
        "log_dtype": "float32",
    }
    assert options.keys() <= defaults.keys()
    return SimpleNamespace(**{**defaults, **options})


def make_inputs(seed=0, B=2, T=7, H=2, n=3, half=2, Dv=2):
    """Query, target, gate, keys and values for `fast_weight_memory`, in the order of its arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, target, gate = normal(B, T, H, 2 * half), normal(B, T, Dv), normal(B, T).sigmoid()
    return [query, target, gate, normal(H, 2, n, half), normal(n * n, Dv)]


@st.composite
def problems(draw, max_batch=3, max_length=8, **fixed):
    """`(inputs, config)`: only sizes, options and a seed are drawn; the tensors come from a seeded generator."""
    n = draw(st.integers(2, 4))
    options = {
        "topk": st.integers(1, n),
        "chunk_size": st.integers(1, 4),
        "lookahead": st.integers(0, 2),
        "learning_rate": st.sampled_from([0.5, 1.0]),
        "write_scale": st.sampled_from(SCALES),
        "score": st.sampled_from(SCORES),
        "score_eps": st.sampled_from([1e-2, 0.1]),
        "temperature": st.sampled_from([0.7, 1.5]),
        "nonlinearity": st.sampled_from(["softmax", "relu", "silu"]),
        "addressing_weight": st.sampled_from([0.3, 1.0]),
        "key_update": st.sampled_from(["fast", "train_only", "slow"]),
        "scope": st.sampled_from(["sequence", "shared"]),
    }
    config = make_config(**{name: fixed[name] if name in fixed else draw(drawn) for name, drawn in options.items()})
    sizes = {"B": draw(st.integers(1, max_batch)), "T": draw(st.integers(1, max_length)), "H": draw(st.integers(1, 2))}
    sizes |= {"n": n, "half": draw(st.integers(1, 2)), "Dv": draw(st.integers(1, 3))}
    return make_inputs(draw(st.integers(0, 2**32 - 1)), **sizes), config


def assert_close(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape
    if expected.numel():
        bound = tolerance * (1 + expected.abs().max())
        assert (actual - expected).abs().max() <= bound


def assert_same_result(actual, expected):
    for name, a, e in zip(reference.Result._fields, actual, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert_close(a, e)


def tokens_of_memories(config, B, start, stop):
    """For every memory, its chunk's tokens `(row, column)`."""
    if config.scope == "shared":
        return [list(product(range(B), range(start, stop)))]
    return [[(b, t) for t in range(start, stop)] for b in range(B)]


# 2.1 to 2.4: addressing and reading


@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(1, 4),
    n=st.integers(1, 5),
    k=st.integers(1, 5),
    lead=st.sampled_from([(), (2,), (2, 0), (1, 3)]),
    H=st.integers(1, 2),
)
@example(seed=0, levels=1, n=3, k=2, lead=(), H=1)
def test_topk_is_the_best_of_all_pairs(seed, levels, n, k, lead, H):
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (*lead, H, 2, n), generator=generator)  # few levels: ties everywhere
    actual_scores, slots, sub_slots = reference.product_key_topk(scores, k)
    assert actual_scores.shape == slots.shape == (*lead, H, k)
    assert sub_slots.shape == (*lead, H, 2, k)
    assert actual_scores.dtype == torch.float64
    assert slots.dtype == sub_slots.dtype == torch.int64
    found = zip(actual_scores.reshape(-1, k), slots.reshape(-1, k), sub_slots.reshape(-1, 2, k), strict=True)
    for (first, second), (s, slot, sub) in zip(scores.reshape(-1, 2, n).tolist(), found, strict=True):
        orders = [sorted(range(n), key=lambda i: (-book[i], i)) for book in (first, second)]
        pairs = product(range(n), range(n))  # ranks
        pairs = sorted(pairs, key=lambda r: (-first[orders[0][r[0]]] - second[orders[1][r[1]]], r))[:k]
        pairs = [(orders[0][a], orders[1][b]) for a, b in pairs]
        assert slot.tolist() == [i * n + j for i, j in pairs]
        assert s.tolist() == [first[i] + second[j] for i, j in pairs]
        assert sub.tolist() == [order[:k] for order in orders]


def test_topk_refuses_more_slots_than_sub_keys():
    with pytest.raises(ValueError, match="k must be"):
        reference.product_key_topk(torch.zeros(1, 2, 3), 4)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SCORES), st.sampled_from([1e-3, 0.5]), st.booleans())
def test_address_scores_each_half_against_its_codebook(seed, score, eps, own_keys):
    M, P, H, n, half, k = 2, 3, 2, 3, 2, 2
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(M, P, H, 2 * half, generator=generator)
    keys = torch.randn(M if own_keys else 1, H, 2, n, half, generator=generator)
    every = reference.sub_scores(query, keys, score, eps)
    for m, t, h, a, i in product(range(M), range(P), range(H), range(2), range(n)):
        q = query[m, t, h, a * half : (a + 1) * half].tolist()
        key = keys[m if own_keys else 0, h, a, i].tolist()
        if score == "dot":
            expected = sum(x * y for x, y in zip(q, key, strict=True))
        else:
            expected = -math.log(eps + sum((x - y) ** 2 for x, y in zip(q, key, strict=True)))
        assert every[m, t, h, a, i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)

    scores, slots, selected, sub_slots = reference.product_key_address(query, keys, k, score, eps)
    expected = reference.product_key_topk(every, k)
    assert torch.equal(scores, expected[0])
    assert torch.equal(slots, expected[1])
    assert torch.equal(sub_slots, expected[2])
    assert torch.equal(selected, every.gather(-1, sub_slots))
    first = every[..., 0, :].gather(-1, slots // n)
    second = every[..., 1, :].gather(-1, slots % n)
    assert torch.equal(scores, first + second)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1.0, 2.0]), st.integers(1, 3), st.integers(1, 4))
def test_weights_are_over_all_heads(seed, temperature, H, k):
    scores = torch.randn(5, H, k, generator=torch.Generator().manual_seed(seed)).double()
    softmax = reference.weights(scores, temperature, "softmax")
    assert softmax.shape == (5, H * k)
    assert_close(softmax.sum(-1), torch.ones(5).double())
    for t, h, j in product(range(5), range(H), range(k)):
        s = scores[t, h, j].item() / temperature
        ratio = math.exp(s - scores[t, 0, 0].item() / temperature)
        assert (softmax[t, h * k + j] / softmax[t, 0]).item() == pytest.approx(ratio)
        relu, silu = (reference.weights(scores, temperature, name)[t, h * k + j].item() for name in ("relu", "silu"))
        assert relu == pytest.approx(max(s, 0.0))
        assert silu == pytest.approx(s / (1 + math.exp(-s)))


def test_read_is_the_weighted_sum_of_rows():
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    slots = torch.tensor([[0, 2], [1, 1]])
    out = reference.memory_read(values, slots, torch.tensor([[0.5, 0.25], [3.0, -1.0]]))
    assert out.dtype == torch.float64
    assert out.tolist() == [[1.0, 0.5], [0.0, 2.0]]


# 2.6 and 2.7: scales, loss, key commit


def test_write_scale():
    w = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    assert reference.write_scale(w, "reference", 4, 1).tolist() == [4 * 4 / 3] * 2
    assert reference.write_scale(w, "paper", 4, 1).tolist() == [1.0, 1.0]
    exact = reference.write_scale(w, "exact", 4, 1)
    assert exact.tolist() == [2.0, 0.0]
    (gradient,) = torch.autograd.grad(exact.sum(), w)
    assert gradient.tolist() == [[-4.0, -4.0, 0.0, 0.0], [0.0] * 4]  # -2 w / (sum w^2)^2, and no NaN
    for mode in SCALES:
        assert reference.write_scale(w, mode, 2, 2).tolist() == [0.0, 0.0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_addressing_loss_is_the_negative_entropy_of_mean_use(seed, P, H, k):
    M, n = 2, 4
    generator = torch.Generator().manual_seed(seed)
    every = torch.randn(M, P, H, 2, n, generator=generator)
    _, _, sub_slots = reference.product_key_topk(every, k)
    loss = reference.addressing_loss(every.double().gather(-1, sub_slots), sub_slots, n)
    assert loss.shape == (M,)
    for m in range(M):
        expected = 0.0
        for a in range(2):
            use = [0.0] * n
            for t, h in product(range(P), range(H)):
                chosen = sub_slots[m, t, h, a].tolist()
                total = sum(math.exp(every[m, t, h, a, i]) for i in chosen)
                for i in chosen:
                    use[i] += math.exp(every[m, t, h, a, i]) / total / (P * H)
            expected += sum(p * math.log(p + 1e-8) for p in use)
        assert loss[m].item() == pytest.approx(expected, abs=1e-9)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SCORES),
    st.sampled_from(["none", "random", "all", "empty"]),
    st.sampled_from([0.3, 1.0]),
    st.booleans(),
)
def test_key_commit_is_its_closed_form(seed, score, masking, rate, own_keys):
    M, P, H, n, half, k, eps = 2, 3, 2, 4, 2, 2, 1e-2
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(M, P, H, 2 * half, generator=generator, dtype=torch.float64)
    keys = torch.randn(M if own_keys else 1, H, 2, n, half, generator=generator, dtype=torch.float64)
    if masking == "none":
        mask, kept = None, torch.ones(M, P, dtype=torch.bool)
    else:
        threshold = {"random": 0.5, "all": -1.0, "empty": 2.0}[masking]
        mask = kept = torch.rand(M, P, generator=generator) > threshold
    _, _, selected, sub_slots = reference.product_key_address(query, keys, k, score, eps)
    committed = reference.key_commit(query, keys, selected, sub_slots, mask, rate, score, eps)

    expected = keys.expand(M, -1, -1, -1, -1).clone()
    for m, a in product(range(M), range(2)):
        pairs = [(t, h) for t, h in product(range(P), range(H)) if kept[m, t]]
        use = torch.zeros(n, dtype=torch.float64)
        for t, h in pairs:
            use[sub_slots[m, t, h, a]] += selected[m, t, h, a].softmax(-1) / len(pairs)
        u = (torch.log(use + 1e-8) + use / (use + 1e-8)) / max(len(pairs), 1)
        for t, h in pairs:
            chosen = sub_slots[m, t, h, a]
            p = selected[m, t, h, a].softmax(-1)
            d_score = p * (u[chosen] - (p * u[chosen]).sum())
            q = query[m, t, h, a * half : (a + 1) * half]
            for i, c in zip(chosen.tolist(), d_score, strict=True):
                key = keys[m if own_keys else 0, h, a, i]
                d_key = q if score == "dot" else 2 * (q - key) / (eps + (q - key).square().sum())
                expected[m, h, a, i] -= rate * c * d_key
    assert_close(committed, expected)


@pytest.mark.parametrize("score", SCORES)
def test_key_commit_gradients(score):
    query, _, _, keys, _ = make_inputs(seed=3, B=2, T=3, n=4)
    *_, sub_slots = reference.product_key_address(query, keys[None], 2, score)
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def commit(query, keys):
        return reference.key_commit(query, keys, None, sub_slots, mask, 0.7, score, 1e-3)

    arguments = (query.requires_grad_(), keys[None].clone().requires_grad_())
    assert torch.autograd.gradcheck(commit, arguments)
    query_gradient, _ = torch.autograd.grad(commit(*arguments).square().sum(), arguments)
    assert not query_gradient[0, 1].any()
    assert query_gradient[0, 0].any()


# 2.5, 2.6, 2.8: what one chunk does


@given(problems(max_length=4), st.booleans())
def test_a_chunk_is_one_gradient_step(problem, training):
    """Values: on `kappa_t/2 g ||y - v||^2`, a slot's gradient averaged over its reads; keys: on the addressing loss."""
    inputs, config = problem
    query, target, gate, keys, values = inputs
    B, C = gate.shape
    L, H, n = config.lookahead, query.shape[2], keys.shape[-2]
    result = reference.fast_weight_memory(*inputs, config, chunk_lengths=[C], training=training)
    assert result.output.shape == target.shape
    assert result.slots.dtype == torch.int64
    assert_close(result.output, reference.memory_read(values, result.slots, result.weights))

    losses = []
    for m, tokens in enumerate(tokens_of_memories(config, B, 0, C)):
        variable, loss, reads = values.clone().requires_grad_(), 0.0, torch.zeros(n * n, 1)
        for b, t in tokens:
            w = result.weights[b, t]
            for slot in result.slots[b, t].tolist():
                reads[slot] += 1
            if t + L < C:
                error = target[b, t + L] - sum(w[j] * variable[slot] for j, slot in enumerate(result.slots[b, t]))
                power = w.square().sum()
                kappa = {"reference": H * config.topk * C / (C - L), "paper": 1.0, "exact": 1 / power if power else 0.0}
                loss = loss + kappa[config.write_scale] * gate[b, t] * error.square().sum() / 2
        gradient = torch.autograd.grad(loss, variable)[0] if C > L else torch.zeros_like(values)
        assert_close(result.values[m], values - config.learning_rate * gradient / reads.clamp(min=1))

        variable = keys[None].clone().requires_grad_()
        q = torch.stack([query[b, t] for b, t in tokens])[None]
        address = reference.product_key_address(q, variable, config.topk, config.score, config.score_eps)
        scores, slots, selected, sub_slots = address
        w = reference.weights(scores, config.temperature, config.nonlinearity).detach()
        assert_close(torch.stack([result.weights[b, t] for b, t in tokens]), w[0])
        assert torch.equal(torch.stack([result.slots[b, t] for b, t in tokens]), slots[0].flatten(-2))
        loss = reference.addressing_loss(selected, sub_slots, n)[0]
        moves = config.key_update == "fast" or (config.key_update == "train_only" and training)
        rate = config.learning_rate * config.addressing_weight if moves else 0.0
        assert_close(result.keys[m], (variable - rate * torch.autograd.grad(loss, variable)[0])[0].detach())
        losses.append(loss.detach())
    assert_close(result.addressing_loss, torch.stack(losses).mean())


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.integers(1, 3),
    H=st.integers(1, 2),
    k=st.integers(1, 2),
    L=st.integers(0, 2),
    score=st.sampled_from(SCORES),
)
def test_exact_writes_are_read_back(seed, C, H, k, L, score):
    """At `g = lr = 1` and without collisions the next read of the same address returns its target."""
    n, half = H * C * k, 2
    generator = torch.Generator().manual_seed(seed)
    # Every (head, token) has k sub-keys of its own, around one direction on a large circle: no slot is shared.
    angles = 2 * math.pi * torch.arange(H * C) / (H * C)
    centers = 100 * torch.stack([angles.cos(), angles.sin()], -1).double()
    keys = centers.repeat_interleave(k, 0) + torch.randn(H, 2, n, half, generator=generator)
    query = centers.unflatten(0, (H, C)).transpose(0, 1).repeat(1, 1, 2)[None] / (10 if score == "dot" else 1)
    target = torch.randn(1, C, 3, generator=generator).double()
    values = torch.randn(n * n, 3, generator=generator).double()
    config = make_config(topk=k, chunk_size=C, lookahead=L, write_scale="exact", key_update="slow", score=score)
    result = reference.fast_weight_memory(
        query.repeat(1, 2, 1, 1), target.repeat(1, 2, 1), torch.ones(1, 2 * C), keys, values, config
    )
    assert result.slots[0, :C].unique().numel() == C * H * k
    stored = max(C - L, 0)
    first, second = result.output[0].split(C)
    assert_close(second[:stored], target[0, C - stored :])
    assert_close(second[stored:], first[stored:])


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 2), st.sampled_from([0.5, 1.0]), st.integers(1, 3))
def test_a_hot_row_stays_an_average(seed, C, L, rate, B):
    """However many tokens write to one slot, it moves to their mean target; tokens without a target count as reads."""
    query, target, _, keys, values = make_inputs(seed, B=B, T=C, H=1)
    query = query[:1, :1].expand(B, C, -1, -1)
    for scale, scope in product(("paper", "reference"), ("sequence", "shared")):
        config = make_config(topk=1, lookahead=L, write_scale=scale, scope=scope, learning_rate=rate)
        result = reference.fast_weight_memory(query, target, torch.ones(B, C), keys, values, config, chunk_lengths=[C])
        slot = result.slots[0, 0, 0]
        rows = target.flatten(0, 1)[None] if scope == "shared" else target
        if C > L:
            stored = target[:, L:].flatten(0, 1)[None] if scope == "shared" else target[:, L:]
            share = 1.0 if scale == "reference" else stored.shape[1] / rows.shape[1]
            expected = values[slot] + rate * share * (stored.mean(1) - values[slot])
        else:
            expected = values[slot].expand(len(rows), -1)
        assert_close(result.values[:, slot], expected)
        others = torch.arange(len(values)) != slot
        assert torch.equal(result.values[:, others], values[others].expand(len(rows), -1, -1))


@given(problems(learning_rate=0.0), st.booleans())
def test_a_learning_rate_of_zero_changes_nothing(problem, training):
    inputs, config = problem
    result = reference.fast_weight_memory(*inputs, config, training=training, commit_partial=True)
    assert_close(result.output, reference.memory_read(inputs[4], result.slots, result.weights))
    assert torch.equal(result.keys, inputs[3].expand_as(result.keys))
    assert torch.equal(result.values, inputs[4].expand_as(result.values))


@pytest.mark.parametrize("scale", SCALES)
def test_a_short_chunk_moves_keys_only(scale):
    inputs = make_inputs(T=2)
    result = reference.fast_weight_memory(*inputs, make_config(chunk_size=2, lookahead=2, write_scale=scale))
    assert torch.equal(result.values, inputs[4].expand_as(result.values))
    assert not torch.equal(result.keys[0], inputs[3])


# Chunks, calls and batches


@given(problems(), st.booleans(), st.booleans())
def test_chunk_lengths(problem, training, commit_partial):
    inputs, config = problem
    T, C = inputs[2].shape[1], config.chunk_size
    grid = [C] * (T // C)
    result = reference.fast_weight_memory(*inputs, config, training=training, commit_partial=commit_partial)
    if commit_partial and T % C:
        grid.append(T % C)
    assert_same_result(reference.fast_weight_memory(*inputs, config, grid, training), result)


@given(problems(max_batch=2), st.booleans(), st.data())
def test_one_call_is_its_chunks_one_by_one(problem, training, data):
    inputs, config = problem
    query, target, gate, keys, values = inputs
    B, T = gate.shape
    lengths = data.draw(st.lists(st.integers(1, 4), max_size=4).filter(lambda lengths: sum(lengths) <= T))
    result = reference.fast_weight_memory(*inputs, config, lengths, training)
    losses = []
    for m, rows in enumerate([slice(0, B)] if config.scope == "shared" else [slice(b, b + 1) for b in range(B)]):
        state = keys, values
        start = 0
        for length in [*lengths, T - sum(lengths)]:
            part = [x[rows, start : start + length] for x in (query, target, gate)]
            is_open = start + length == T and start == sum(lengths)
            step = reference.fast_weight_memory(*part, *state, config, [] if is_open else [length], training)
            state = step.keys, step.values[0]
            for name in ("output", "slots", "weights"):
                assert_close(getattr(result, name)[rows, start : start + length], getattr(step, name))
            if not is_open:
                losses.append(step.addressing_loss)
            start += length
        assert_close(result.keys[m], state[0].reshape_as(result.keys[m]))
        assert_close(result.values[m], state[1])
    assert_close(result.addressing_loss, torch.stack(losses).mean() if losses else torch.tensor(0.0).double())


@given(problems(), st.integers(0, 2**32 - 1), st.data())
def test_no_output_depends_on_later_tokens(problem, seed, data):
    inputs, config = problem
    B, T = inputs[2].shape
    t = data.draw(st.integers(0, T - 1))
    other = make_inputs(seed, B, T, inputs[0].shape[2], inputs[3].shape[2], inputs[3].shape[3], inputs[1].shape[2])
    changed = [torch.cat([x[:, : t + 1], y[:, t + 1 :]], 1) for x, y in zip(inputs[:3], other[:3], strict=True)]
    before = reference.fast_weight_memory(*inputs, config)
    after = reference.fast_weight_memory(*changed, *inputs[3:], config)
    for name in ("output", "slots", "weights"):
        assert torch.equal(getattr(before, name)[:, : t + 1], getattr(after, name)[:, : t + 1])


@given(problems(scope="sequence"))
def test_sequences_are_isolated(problem):
    inputs, config = problem
    result = reference.fast_weight_memory(*inputs, config, commit_partial=True)
    losses = []
    for b in range(len(inputs[0])):
        own = [x[b : b + 1] for x in inputs[:3]]
        alone = reference.fast_weight_memory(*own, *inputs[3:], config, commit_partial=True)
        for name in ("output", "slots", "weights", "keys", "values"):
            assert_close(getattr(result, name)[b : b + 1], getattr(alone, name))
        losses.append(alone.addressing_loss)
    assert_close(result.addressing_loss, torch.stack(losses).mean())


@given(problems(scope="shared"), st.randoms(use_true_random=False))
def test_a_shared_memory_takes_the_batch_in_any_order(problem, random):
    inputs, config = problem
    order = list(range(len(inputs[0])))
    random.shuffle(order)
    result = reference.fast_weight_memory(*inputs, config)
    shuffled = reference.fast_weight_memory(*(x[order] for x in inputs[:3]), *inputs[3:], config)
    assert_same_result(
        shuffled, result._replace(**{name: getattr(result, name)[order] for name in ("output", "slots", "weights")})
    )


@given(problems(max_batch=1, scope="shared"))
def test_a_shared_memory_of_one_sequence_is_its_own(problem):
    inputs, config = problem
    shared = reference.fast_weight_memory(*inputs, config)
    config.scope = "sequence"
    assert_same_result(shared, reference.fast_weight_memory(*inputs, config))


@given(problems(key_update="slow", scope="sequence"))
def test_values_are_the_base_plus_the_log_of_writes(problem):
    """`memory_scan` over the records (slots, coefficients, shifted targets, gates) of the chunks is the same memory."""
    inputs, config = problem
    _, target, gate, _, values = inputs
    C, L = config.chunk_size, config.lookahead
    result = reference.fast_weight_memory(*inputs, config)
    S = gate.shape[1] // C
    if S == 0:
        return
    slots, w = (x[:, : S * C].unflatten(1, (S, C)) for x in (result.slots, result.weights))
    kappa = reference.write_scale(w, config.write_scale, C, L)
    counts = (slots.flatten(2)[..., None] == slots.flatten(2)[..., None, :]).sum(-1).view_as(slots)
    coefficients = config.learning_rate * kappa[..., None] * w / counts
    coefficients[:, :, max(C - L, 0) :] = 0
    targets = target[:, : S * C].unflatten(1, (S, C)).roll(-L, 2)
    gates = gate[:, : S * C].unflatten(1, (S, C))
    out, final = reference.memory_scan(values, slots, w, coefficients, targets, gates)
    assert_close(out.flatten(1, 2), result.output[:, : S * C])
    assert_close(final, result.values)

    log = coefficients[..., None] * (gates[..., None] * (targets - out))[..., None, :]
    for m in range(len(slots)):
        total = values.clone()
        for record, slot in zip(log[m].flatten(0, 2), slots[m].flatten().tolist(), strict=True):
            total[slot] += record
        assert_close(total, final[m])


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_an_empty_call_returns_the_memory(scope):
    inputs = make_inputs(T=0)
    result = reference.fast_weight_memory(*inputs, make_config(scope=scope), commit_partial=True)
    assert result.output.shape == (2, 0, 2)
    assert result.slots.shape == result.weights.shape == (2, 0, 4)
    assert torch.equal(result.keys, inputs[3].expand_as(result.keys))
    assert torch.equal(result.values, inputs[4].expand_as(result.values))


@pytest.mark.parametrize("option", ["score", "nonlinearity", "write_scale"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=option):
        reference.fast_weight_memory(*make_inputs(), make_config(**{option: "other"}))


# 2.9: gradients


@pytest.mark.parametrize(
    ("options", "B", "T"),
    [
        ({}, 1, 7),
        ({"score": "dot", "lookahead": 0, "chunk_size": 2, "write_scale": "paper"}, 1, 5),
        ({"lookahead": 2, "write_scale": "exact"}, 1, 7),
        ({"score": "dot", "write_scale": "exact", "nonlinearity": "silu", "temperature": 0.7}, 1, 7),
        ({"scope": "shared", "write_scale": "paper", "chunk_size": 2, "key_update": "train_only"}, 2, 5),
        ({"score": "dot", "lookahead": 2, "learning_rate": 0.5, "nonlinearity": "relu"}, 1, 7),
        ({"lookahead": 0, "chunk_size": 2, "write_scale": "exact", "key_update": "slow"}, 2, 5),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_gradients_are_those_of_finite_differences(options, B, T):
    """To all five inputs, through the reads and both commits of every chunk, and out to the final memory."""
    config = make_config(**options)

    def run(*inputs):
        result = reference.fast_weight_memory(*inputs, config, training=True, commit_partial=T == 5)
        return result.output, result.keys, result.values

    inputs = [x.requires_grad_() for x in make_inputs(seed=1, B=B, T=T)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("key_update", ["fast", "slow"])
def test_the_addressing_loss_reaches_keys_and_not_queries(key_update):
    query, target, gate, keys, values = (x.requires_grad_() for x in make_inputs(T=6))
    config = make_config(key_update=key_update)

    def loss(keys):
        return reference.fast_weight_memory(query, target, gate, keys, values, config).addressing_loss

    assert torch.autograd.gradcheck(loss, (keys,))
    value_gradient, query_gradient = torch.autograd.grad(loss(keys), (values, query), allow_unused=True)
    assert value_gradient is None
    if key_update == "slow":
        assert query_gradient is None


def test_detach_every_cuts_the_chain_of_chunks():
    def gradients(detach_every, outputs):
        inputs = [x.requires_grad_() for x in make_inputs(T=8)]
        config = make_config(chunk_size=2, detach_every=detach_every)
        loss = reference.fast_weight_memory(*inputs, config).output[:, outputs].square().sum()
        *tokens, keys, values = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        return tokens, keys, values

    late = slice(4, 8)  # chunks 2 and 3
    tokens, keys, values = gradients(2, late)
    assert not any(x[:, :4].any() for x in tokens)
    assert not keys.any()
    assert not values.any()
    assert all(x[:, 4:6].any() for x in tokens)  # chunk 3 still depends on chunk 2
    tokens, keys, values = gradients(None, late)
    assert all(x[:, :2].any() for x in tokens)
    assert keys.any()
    assert values.any()
    for cut, whole in zip(gradients(2, slice(0, 4)), gradients(None, slice(0, 4)), strict=True):
        assert all(map(torch.equal, cut, whole))


def test_the_result_has_no_graph_without_gradients():
    assert not any(x.requires_grad for x in reference.fast_weight_memory(*make_inputs(), make_config()))
    with torch.no_grad():
        inputs = [x.requires_grad_() for x in make_inputs()]
        assert not any(x.requires_grad for x in reference.fast_weight_memory(*inputs, make_config()))


def test_narrow_inputs_are_cast_differentiably():
    inputs = [x.float().requires_grad_() for x in make_inputs(T=6)]
    result = reference.fast_weight_memory(*inputs, make_config())
    assert all(x.dtype == torch.float64 for x in (result.output, result.weights, result.keys, result.values))
    for gradient in torch.autograd.grad(result.output.sum(), inputs):
        assert gradient.dtype == torch.float32
        assert gradient.any()
