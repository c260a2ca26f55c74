"""Gated delta rule (Yang et al. 2024, "Gated Delta Networks"): a matrix that decays, is corrected and is read."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from fwpkm.checks import require, require_dtype, require_shape
from fwpkm.ops._batching import fold
from fwpkm.ops._library import refuse_double_backward, register, register_backward

CHUNK = 64  # tokens that are solved for together
BLOCK = 16  # chunks that are prepared together: few calls, and little memory whatever the length
EPSILON = 1e-6  # of the normalization of queries and keys


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S <- exp(g) S; S <- S + beta k (v - S^T k)^T; out = S^T q / sqrt(Dk)``, token after token (equation 10).

    ``q`` and ``k`` are ``query`` and ``key`` divided by ``sqrt(|x|^2 + 1e-6)``. A token with ``beta = decay = 0``
    changes nothing; one whose decay is below -104 sees nothing before it.

    Args:
        query, key: ``[B, T, Hk, Dk]`` float32, bfloat16 or float16 (float64 for numerical checks).
        value: ``[B, T, H, Dv]``, their dtype; ``H`` a multiple of ``Hk``: key head ``h`` serves value heads
            ``h H / Hk`` up to the next one's.
        decay: ``[B, T, H]``, the logarithm ``g <= 0``, float32 (or float64 with the others) or their dtype.
        beta: ``[B, T, H]``, dtype as ``decay``.
        initial_state: ``[B, H, Dk, Dv]``, float32 (or float64); None: zeros.

    Returns:
        ``out [B, T, H, Dv]`` in the dtype of ``value``, and the state after the last token, ``[B, H, Dk, Dv]`` float32
        (or float64). All is computed in that. Gradients flow to every input.

    Raises:
        ValueError: for a wrong shape or dtype.
    """
    require_shape("query", query, ("B", "T", "Hk", "Dk"))
    require_dtype("query", query, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    batch, length, key_heads, width = query.shape
    require_shape("key", key, query.shape)
    require_shape("value", value, (batch, length, "H", "Dv"))
    heads = value.shape[2]
    require(key_heads > 0 and heads % key_heads == 0, "value.shape[2]", heads, "a multiple of {} key heads", key_heads)
    for name, x in (("key", key), ("value", value)):
        require_dtype(name, x, query.dtype)
    wide = _computed_in(query)
    for name, x in (("decay", decay), ("beta", beta)):
        require_shape(name, x, (batch, length, heads))
        require_dtype(name, x, *dict.fromkeys((wide, query.dtype)))
    if initial_state is not None:
        require_shape("initial_state", initial_state, (batch, heads, width, value.shape[3]))
        require_dtype("initial_state", initial_state, wide)
    out, state = _operator(query, key, value, decay, beta, initial_state)
    return out, state


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Rows(NamedTuple):
    """The inputs of ``R = B * H`` rows, each a head of a sequence."""

    query: Tensor  # [R, T, Dk] of length 1 / sqrt(Dk)
    key: Tensor  # [R, T, Dk] of length 1
    value: Tensor  # [R, T, Dv]
    decay: Tensor  # [R, T] float64: sums of decays are large after a token that sees nothing, their differences count
    beta: Tensor  # [R, T]

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> "_Rows":
        wide, heads = _computed_in(query), value.shape[2]
        unit_query, unit_key = (_by_row(_unit(x.to(wide))[0], heads) for x in (query, key))
        decay, beta = (_by_row(x.to(wide).unsqueeze(-1), heads).squeeze(-1) for x in (decay, beta))
        return cls(unit_query * query.shape[3] ** -0.5, unit_key, _by_row(value.to(wide), heads), decay.double(), beta)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, and what they were multiplied by."""
    scale = (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    return x * scale, scale


def _by_row(x: Tensor, heads: int) -> Tensor:
    """``[B, T, Hk, D]`` -> ``[B * H, T, D]``, contiguous, each of the ``Hk`` heads for all that it serves."""
    batch, length, served, width = x.shape
    by_head = x.movedim(1, 2).unsqueeze(2).expand(batch, served, heads // served, length, width)
    return by_head.reshape(batch * heads, length, width)


def _by_token(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Back to ``[B, T, Hk, D]`` or ``[B, T, H]``, the sum over the heads that were served."""
    batch, length, served = shape[:3]
    rows = x.reshape(batch, served, -1 if x.numel() else 1, length, x.shape[2] if len(shape) == 4 else 1)
    return rows.sum(2).movedim(1, 2).reshape(shape).contiguous()


class _Chunks(NamedTuple):
    """What does not depend on the state, in ``N`` chunks of ``C`` tokens, ``[R, N, C, ...]`` (the paper's section 3.3).

    With ``G`` the decay summed up from the chunk's first token, ``S`` the state before the chunk, and ``U`` what is
    written: ``(I + A) U = beta (V - e^G K S)``, ``out = e^G Q S + P U``, and the next state is ``e^(G_C) S + Z^T U``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    beta: Tensor  # [R, N, C]
    pair: Tensor  # [R, N, C, C] exp(G_i - G_j) for i >= j
    overlap: Tensor  # [R, N, C, C] A / beta: k_i k_j exp(G_i - G_j) for i > j
    reads: Tensor  # P [R, N, C, C]
    since: Tensor  # e^G [R, N, C]
    until: Tensor  # exp(G_C - G) [R, N, C]
    written: Tensor  # (I + A)^-1 beta V, [R, N, C, Dv]; :meth:`run` takes away what of it the state knows
    known: Tensor  # W = (I + A)^-1 beta e^G K, [R, N, C, Dk]
    carried: Tensor  # Z = exp(G_C - G) K, [R, N, C, Dk]

    @classmethod
    def of(cls, rows: _Rows, tokens: slice, chunk: int) -> "_Chunks":
        query, key, value, decay, beta = (x[:, tokens].unflatten(1, (-1, chunk)) for x in rows)
        total = decay.cumsum(-1)
        pair = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(key.dtype).exp_().tril_()
        since, until = (x.exp().to(key.dtype) for x in (total, total[..., -1:] - total))
        overlap = (key @ key.mT).mul_(pair).tril_(-1)
        scale = beta.unsqueeze(-1)
        sides = torch.cat((value * scale, key * (scale * since.unsqueeze(-1))), -1)
        solved = solve_triangular(scale * overlap, sides, upper=False, unitriangular=True)
        written, known = (x.contiguous() for x in solved.split((value.shape[-1], key.shape[-1]), -1))
        reads = (query @ key.mT).mul_(pair)
        carried = key * until.unsqueeze(-1)
        return cls(query, key, value, beta, pair, overlap, reads, since, until, written, known, carried)

    @property
    def kept(self) -> Tensor:
        """``e^(G_C) [R, N, 1, 1]``: what of a state is left after the chunk."""
        return self.since[..., -1:].unsqueeze(-1)

    def run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state before each chunk, ``[R, N, Dk, Dv]``, and the last one; ``written`` becomes ``U``."""
        states = state.new_empty(*self.known.shape[:2], *state.shape[1:])
        kept = self.kept
        for n in range(states.shape[1]):
            states[:, n] = state
            written = self.written[:, n].baddbmm_(self.known[:, n], state, alpha=-1)
            state = (kept[:, n] * state).baddbmm_(self.carried[:, n].mT, written)
        return states, state

    def out(self, states: Tensor) -> Tensor:
        return ((self.query * self.since.unsqueeze(-1)) @ states).add_(self.reads @ self.written)

    def backward(self, grad: Tensor, states: Tensor, grad_state: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of the rows' tokens, in their order, and of the state before them.

        Takes those of ``out`` and of the state after them; ``written`` must be ``U``.
        """
        query, key, value, written, pair = self.query, self.key, self.value, self.written, self.pair
        since, until, beta = (x.unsqueeze(-1) for x in (self.since, self.until, self.beta))
        grad_written = self.reads.mT @ grad
        grad_before = (query * since).mT @ grad
        grad_after = torch.empty_like(states)
        kept = self.kept
        for n in reversed(range(states.shape[1])):
            grad_after[:, n] = grad_state
            of_chunk = grad_written[:, n].baddbmm_(self.carried[:, n], grad_state)
            grad_state = torch.baddbmm(grad_before[:, n], self.known[:, n].mT, of_chunk, alpha=-1)
            grad_state.addcmul_(kept[:, n], grad_after[:, n])
        grad_sides = solve_triangular((beta * self.overlap).mT, grad_written, upper=True, unitriangular=True)

        by_state = grad @ states.mT  # of e^G Q
        by_next = written @ grad_after.mT  # of Z
        by_sides = grad_sides @ states.mT  # of -beta e^G K
        grad_reads = (grad @ written.mT).tril_()
        grad_solved = (grad_sides @ written.mT).tril_(-1).neg_()  # of A
        grad_products = grad_reads * pair  # of Q K^T
        grad_overlaps = (beta * grad_solved).mul_(pair)  # of K K^T
        grad_query = (by_state * since).add_(grad_products @ key)
        grad_key = (by_next * until).sub_(by_sides * (beta * since))
        grad_key.add_(grad_products.mT @ query).add_((grad_overlaps + grad_overlaps.mT) @ key)
        from_sides = (by_sides * key).sum(-1).mul_(self.since)
        from_overlap = grad_solved.mul_(self.overlap)
        grad_beta = (grad_sides * value).sum(-1).sub_(from_sides).add_(from_overlap.sum(-1))

        exponents = grad_reads.mul_(self.reads).add_(from_overlap.mul_(beta))  # of G_i - G_j
        from_carried = (by_next * key).sum(-1).mul_(self.until)
        total = exponents.sum(-1).sub_(exponents.sum(-2)).sub_(from_carried)
        total.add_((by_state * query).sum(-1).mul_(self.since)).sub_(from_sides.mul_(self.beta))
        total[..., -1] += from_carried.sum(-1) + self.since[..., -1] * (states * grad_after).sum((-1, -2))
        grad_decay = total.flip(-1).cumsum(-1).flip(-1)
        grads = (grad_query, grad_key, beta * grad_sides, grad_decay, grad_beta)
        return tuple(x.flatten(1, 2) for x in grads), grad_state


def _blocks(length: int) -> Iterator[tuple[slice, int]]:
    """Tokens that are computed together, with their chunks' size: no padding, what is left over is a chunk."""
    whole = length // CHUNK * CHUNK
    for start in range(0, whole, BLOCK * CHUNK):
        yield slice(start, min(start + BLOCK * CHUNK, whole)), CHUNK
    if whole < length:
        yield slice(whole, length), length - whole


def _first_state(rows: _Rows, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return rows.value.new_zeros(rows.value.shape[0], rows.key.shape[2], rows.value.shape[2])
    return initial_state.flatten(0, 1)


def _one_token(rows: _Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule as it is written."""
    state = state * rows.decay.to(state.dtype).exp().unsqueeze(-1)
    residual = rows.value.baddbmm(rows.key, state, alpha=-1).mul_(rows.beta.unsqueeze(-1))
    state.baddbmm_(rows.key.mT, residual)
    return rows.query @ state, state


def _cpu(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = _Rows.of(query, key, value, decay, beta)
    state = _first_state(rows, initial_state)
    if value.shape[1] == 1:
        out, state = _one_token(rows, state)
    else:
        out = torch.empty_like(rows.value)
        for tokens, chunk in _blocks(value.shape[1]):
            chunks = _Chunks.of(rows, tokens, chunk)
            states, state = chunks.run(state)
            out[:, tokens] = chunks.out(states).flatten(1, 2)
    if not value.shape[1]:
        state = state.clone()  # not the input itself
    return _by_token(out, value.shape).to(value.dtype), state.reshape(_state_shape(query, value))


def _backward_cpu(
    grad: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, decay, beta)
    rows = _Rows.of(*inputs)
    grads = tuple(torch.empty_like(x) for x in rows[:3]) + tuple(torch.empty_like(rows.beta) for _ in range(2))
    grad = _by_row(grad.to(rows.value.dtype), value.shape[2])
    grad_state = grad_state.flatten(0, 1).clone()
    blocks, starts, state = list(_blocks(value.shape[1])), [], _first_state(rows, initial_state)
    for tokens, chunk in blocks:
        starts.append(state)
        if len(starts) < len(blocks):
            _, state = _Chunks.of(rows, tokens, chunk).run(state)
    for (tokens, chunk), start in zip(reversed(blocks), reversed(starts), strict=True):
        chunks = _Chunks.of(rows, tokens, chunk)
        states, _ = chunks.run(start)
        of_block, grad_state = chunks.backward(grad[:, tokens].unflatten(1, (-1, chunk)), states, grad_state)
        for whole, part in zip(grads, of_block, strict=True):
            whole[:, tokens] = part
    by_token = [_by_token(x, like.shape) for x, like in zip(grads, inputs, strict=True)]
    by_token[0] = _unit_backward(by_token[0] * query.shape[3] ** -0.5, query)
    by_token[1] = _unit_backward(by_token[1], key)
    of_state = grad_state.new_empty(0) if initial_state is None else grad_state.view(initial_state.shape)
    return *(x.to(like.dtype).contiguous() for x, like in zip(by_token, inputs, strict=True)), of_state


def _unit_backward(grad: Tensor, x: Tensor) -> Tensor:
    unit, scale = _unit(x.to(grad.dtype))
    return scale * (grad - unit * (unit * grad).sum(-1, keepdim=True))


def _state_shape(query: Tensor, value: Tensor) -> tuple[int, ...]:
    return query.shape[0], value.shape[2], query.shape[3], value.shape[3]


def _fake(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), value.new_empty(_state_shape(query, value), dtype=_computed_in(query))


def _backward_fake(
    grad: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    *state: Any,
) -> tuple[Tensor, ...]:
    of_state = grad_state.new_empty(0 if state[0] is None else grad_state.shape)
    return *(x.new_empty(x.shape) for x in (query, key, value, decay, beta)), of_state


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> Any:
    saved = ctx.saved_tensors  # asked for once: a checkpoint computes them for one asking
    *grads, of_state = _backward_operator(grad, grad_state, *saved)
    return *grads, None if saved[-1] is None else of_state


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    folded, sizes = fold(info, in_dims, args)
    return tuple(x.unflatten(0, sizes) for x in _operator(*folded)), 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    folded, sizes = fold(info, in_dims, args)
    *grads, of_state = _backward_operator(*folded)
    by_sample = [x.unflatten(0, sizes) for x in grads]
    if args[-1] is None:
        return (*by_sample, of_state), (0,) * len(grads) + (None,)
    return (*by_sample, of_state.unflatten(0, sizes)), 0


def _flops(query: Sequence[int], value: Sequence[int], **_: Any) -> int:
    """Of the chunks: two products of keys, half a product to solve, and three that the state takes part in."""
    pairs, tokens = _pairs(query[1]), query[1]
    return query[0] * value[2] * (pairs * (5 * query[3] + 3 * value[3]) + 6 * tokens * query[3] * value[3])


def _backward_flops(query: Sequence[int], value: Sequence[int], **_: Any) -> int:
    """All but the output once more, and two products for each."""
    pairs, tokens = _pairs(query[1]), query[1]
    return query[0] * value[2] * (pairs * (11 * query[3] + 8 * value[3]) + 16 * tokens * query[3] * value[3])


def _pairs(length: int) -> int:
    """Pairs of tokens in a chunk."""
    return length // CHUNK * CHUNK**2 + (length % CHUNK) ** 2


_operator = register(
    "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor? initial_state)"
    " -> (Tensor, Tensor)",
    _cpu,
    "fwpkm.ops.cuda.gated_delta_rule:forward",
    _fake,
    _flops,
)
_backward_operator = register(
    "gated_delta_rule_backward(Tensor grad, Tensor grad_state, Tensor query, Tensor key, Tensor value, Tensor decay,"
    " Tensor beta, Tensor? initial_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_cpu,
    "fwpkm.ops.cuda.gated_delta_rule:backward",
    _backward_fake,
    _backward_flops,
)
register_backward(_operator, _backward, _setup_context, _vmap)
refuse_double_backward(_backward_operator, _backward_vmap)
