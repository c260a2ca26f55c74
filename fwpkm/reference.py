"""Fast-weight product key memory (arXiv 2601.00671 v2) as plain float64 PyTorch: the oracle of the tests.

Section numbers are those of the design's mathematics (2.1 to 2.9). Nothing here is fast, nothing is written in place,
and gradients, also those of the key commit, come from autograd. Floating inputs of any dtype are cast to float64,
differentiably.

Letters: `M` memories, `P` tokens of a chunk, `H` heads, `n` sub-keys a codebook, `N = n*n` slots, `k` slots a head,
`K = H*k` slots a token, `C` the length of a chunk, `L` the lookahead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm.checks import require, require_choice, require_dtype, require_shape


class Result(NamedTuple):
    """What `fast_weight_memory` returns. `keys` and `values` are those after the last commit."""

    output: Tensor  # [B, T, Dv], the reads
    slots: Tensor  # [B, T, H*k] int64
    weights: Tensor  # [B, T, H*k]
    keys: Tensor  # [M, H, 2, n, Dk/2]
    values: Tensor  # [M, N, Dv]
    addressing_loss: Tensor  # scalar


def _double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.float64) for tensor in tensors]


def sub_scores(query: Tensor, keys: Tensor, score: str = "idw", eps: float = 1e-3) -> Tensor:
    """2.1: `query [M, P, H, Dk]` against `keys [M or 1, H, 2, n, Dk/2]`; returns all sub-scores `[M, P, H, 2, n]`.

    `idw`: `-log(eps + ||q - K_i||^2)`; `dot`: `q . K_i`; each half of the query meets its own codebook.
    """
    query, keys = _double(query, keys)
    halves = torch.stack(query.chunk(2, dim=-1), dim=-2).unsqueeze(-2)  # [M, P, H, 2, 1, Dk/2]
    keys = keys.unsqueeze(1)  # [M or 1, 1, H, 2, n, Dk/2]
    if score == "idw":
        return -torch.log(eps + (halves - keys).square().sum(-1))
    if score == "dot":
        return (halves * keys).sum(-1)
    raise ValueError(f"score must be 'idw' or 'dot', not {score!r}")


def _selected_sub_scores(query: Tensor, keys: Tensor, sub_slots: Tensor, score: str, eps: float) -> Tensor:
    """The sub-scores `[M, P, H, 2, k]` of the sub-keys that `sub_slots` selects, as a function of query and keys."""
    return sub_scores(query, keys, score, eps).gather(-1, sub_slots)


def product_key_topk(sub_scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """2.2: the `k` best slots a head from `sub_scores [..., H, 2, n]`.

    Returns `scores [..., H, k]` and `slots [..., H, k]`, best first, and `sub_slots [..., H, 2, k]`, the sub-keys that
    each codebook selects, best first. Slot `i*n + j` is sub-key `i` of codebook 1 with sub-key `j` of codebook 2. Ties:
    the lower sub-key in a codebook, then the lower row-major position in the `k x k` grid of ranks (stable sorts).
    """
    (sub_scores,) = _double(sub_scores)
    n = sub_scores.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} sub-keys of a codebook, not {k}")
    ranked, order = sub_scores.sort(dim=-1, descending=True, stable=True)
    best, sub_slots = ranked[..., :k], order[..., :k]
    grid = best[..., 0, :, None] + best[..., 1, None, :]  # [..., H, k, k]
    scores, cells = grid.flatten(-2).sort(dim=-1, descending=True, stable=True)
    scores, cells = scores[..., :k], cells[..., :k]
    first = sub_slots[..., 0, :].gather(-1, cells // k)
    second = sub_slots[..., 1, :].gather(-1, cells % k)
    return scores, first * n + second, sub_slots


def product_key_address(
    query: Tensor, keys: Tensor, k: int, score: str = "idw", eps: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2.1 and 2.2: from `query [M, P, H, Dk]` and `keys [M or 1, H, 2, n, Dk/2]` to the addressed slots.

    Returns `scores` and `slots [M, P, H, k]`, then `sub_scores` and `sub_slots [M, P, H, 2, k]` of what was selected.
    """
    every = sub_scores(query, keys, score, eps)
    scores, slots, sub_slots = product_key_topk(every, k)
    return scores, slots, every.gather(-1, sub_slots), sub_slots


def weights(scores: Tensor, temperature: float, nonlinearity: str) -> Tensor:
    """2.3: read weights `[..., H*k]` from `scores [..., H, k]`; a softmax is over all heads, which share the values."""
    (scores,) = _double(scores)
    scaled = scores.flatten(-2) / temperature
    if nonlinearity == "softmax":
        return torch.softmax(scaled, dim=-1)
    if nonlinearity == "relu":
        return torch.relu(scaled)
    if nonlinearity == "silu":
        return scaled * torch.sigmoid(scaled)
    raise ValueError(f"nonlinearity must be 'softmax', 'relu' or 'silu', not {nonlinearity!r}")


def memory_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """2.4: the read `sum_j w_j V[slot_j]` `[..., Dv]` from `values [N, Dv]`, `slots [..., K]`, `weights [..., K]`."""
    values, weights = _double(values, weights)
    return (weights.unsqueeze(-1) * values[slots]).sum(-2)


def write_scale(weights: Tensor, mode: str, chunk_length: int, lookahead: int) -> Tensor:
    """2.6 and 2.8: kappa `[...]` of every token, from its `weights [..., H*k]` and the length `C` of its chunk.

    `reference`: `H*k*C / (C-L)`; `paper`: 1; `exact`: `1 / sum_j w_j^2`, 0 where that sum is 0. All are 0 if `C <= L`.
    """
    (weights,) = _double(weights)
    if chunk_length <= lookahead:
        return weights.new_zeros(weights.shape[:-1])
    if mode == "reference":
        return weights.new_full(weights.shape[:-1], weights.shape[-1] * chunk_length / (chunk_length - lookahead))
    if mode == "paper":
        return weights.new_ones(weights.shape[:-1])
    if mode == "exact":
        norm = weights.square().sum(-1)
        positive = norm > 0
        # The inner `where` keeps the gradient of the unused branch finite.
        return torch.where(positive, 1 / torch.where(positive, norm, 1.0), 0.0)
    raise ValueError(f"write_scale must be 'reference', 'paper' or 'exact', not {mode!r}")


def addressing_loss(sub_scores: Tensor, sub_slots: Tensor, n: int) -> Tensor:
    """2.7: `L_addr = -H(p1) - H(p2)` `[M]` of a chunk, from its selected `sub_scores` and `sub_slots [M, P, H, 2, k]`.

    `p` of a codebook is the mean over tokens and heads of the softmax over the selected sub-scores, zero at the
    sub-keys not selected; `H(p) = -sum p log(p + 1e-8)`. A chunk without tokens has loss 0.
    """
    (sub_scores,) = _double(sub_scores)
    M, P, H, _, _ = sub_scores.shape
    p = torch.softmax(sub_scores, dim=-1)
    p = p.new_zeros(M, P, H, 2, n).scatter(-1, sub_slots, p)
    mean = p.sum((1, 2)) / max(P * H, 1)  # [M, 2, n]
    entropy = -(mean * torch.log(mean + 1e-8)).sum(-1)
    return -entropy.sum(-1)


def key_commit(
    query: Tensor,
    keys: Tensor,
    sub_scores: Tensor | None,
    sub_slots: Tensor,
    mask: Tensor | None,
    rate: float,
    score: str,
    eps: float,
) -> Tensor:
    """2.7: `keys - rate * dL_addr/dkeys` `[M, H, 2, n, Dk/2]`, one gradient step on the addressing loss of a chunk.

    `query [M, P, H, Dk]`, `keys [M or 1, H, 2, n, Dk/2]`, `sub_slots [M, P, H, 2, k]` (constants), `mask [M, P]` bool
    or None: tokens that are False are left out of the mean. `sub_scores`, an input of its own for the operator of this
    name, is not looked at: it is recomputed, so that the result's derivative to query and keys is the total one.
    """
    query, keys = _double(query, keys)
    n = keys.shape[-2]
    differentiable = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
    keys = keys.expand(query.shape[0], -1, -1, -1, -1)
    committed = []
    for m in range(query.shape[0]):
        tokens = slice(None) if mask is None else mask[m]
        q, selected = query[m, tokens].unsqueeze(0), sub_slots[m, tokens].unsqueeze(0)
        with torch.enable_grad():
            # A clone: an inner variable to differentiate by, still connected to `keys` for the outer derivative.
            variable = keys[m].clone().unsqueeze(0).requires_grad_()
            loss = addressing_loss(_selected_sub_scores(q, variable, selected, score, eps), selected, n).sum()
            (gradient,) = torch.autograd.grad(loss, variable, create_graph=differentiable)
        committed.append(keys[m] - rate * gradient.squeeze(0))
    return torch.stack(committed)


def _value_commit(values: Tensor, slots: Tensor, coefficients: Tensor, residuals: Tensor) -> Tensor:
    """`values [N, Dv]` plus `coefficients[p, j] * residuals[p]` at row `slots[p, j]`, for every read `(p, j)`."""
    writes = coefficients.unsqueeze(-1) * residuals.unsqueeze(-2)  # [P, K, Dv]
    return values.index_add(0, slots.flatten(), writes.flatten(0, 1))


def memory_scan(
    values: Tensor, slots: Tensor, weights: Tensor, coefficients: Tensor, targets: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """2.4 and 2.6 for `S` chunks of `M` memories whose addresses are known: read, then add coefficients x residuals.

    `values [N, Dv]` is version 0 of every memory; `slots`, `weights` and `coefficients` are `[M, S, P, K]`, `targets`
    `[M, S, P, Dv]`, `gates [M, S, P]`; the residuals of a chunk are `gates * (targets - read)`.
    Returns the reads `[M, S, P, Dv]` and the values after the last chunk `[M, N, Dv]`.
    """
    values, weights, coefficients, targets, gates = _double(values, weights, coefficients, targets, gates)
    M, S = slots.shape[:2]
    outputs, final = [], []
    for m in range(M):
        version = values
        for s in range(S):
            output = memory_read(version, slots[m, s], weights[m, s])
            residuals = gates[m, s].unsqueeze(-1) * (targets[m, s] - output)
            version = _value_commit(version, slots[m, s], coefficients[m, s], residuals)
            outputs.append(output)
        final.append(version)
    return torch.stack(outputs).unflatten(0, (M, S)), torch.stack(final)


class _Run(NamedTuple):
    """What one memory did along its tokens."""

    output: Tensor  # [R, T, Dv]
    slots: Tensor  # [R, T, H*k] int64
    weights: Tensor  # [R, T, H*k]
    keys: Tensor  # [H, 2, n, Dk/2]
    values: Tensor  # [N, Dv]
    losses: list[Tensor]  # the addressing loss of every chunk that committed


def _run(
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
    config: Any,
    chunk_lengths: Sequence[int] | None,
    training: bool,
    commit_partial: bool,
) -> _Run:
    """One memory, chunk by chunk, along the columns of `R` rows: `query [R, T, H, Dk]`, `mask [R, T]`, and so on.

    A masked token neither reads nor writes; its column has its place in the chunk all the same.
    """
    T, L, n = gate.shape[1], config.lookahead, keys.shape[-2]
    lengths = [config.chunk_size] * (T // config.chunk_size) if chunk_lengths is None else list(chunk_lengths)
    n_commits = len(lengths)
    if sum(lengths) < T:
        n_commits += commit_partial
    if sum(lengths) < T or T == 0:
        lengths.append(T - sum(lengths))

    def later(x: Tensor) -> Tensor:
        """What lies `L` columns further on in the chunk `[R, C, ...]`; zero or False at the last `L`."""
        return torch.cat([x[:, L:], torch.zeros_like(x[:, :L])], dim=1)

    score = config.score, config.score_eps
    keys_move = config.key_update == "fast" or (config.key_update == "train_only" and training)
    rounded = config.log_dtype == "bfloat16" and not training
    pieces, losses, start = [], [], 0
    for s, C in enumerate(lengths):
        if config.detach_every and s > 0 and s % config.detach_every == 0:
            values = values.detach()
            if config.key_update != "slow":  # slow keys have no history to cut: they are parameters
                keys = keys.detach()
        chunk = slice(start, start + C)
        start += C

        present = mask[:, chunk]  # [R, C]; indexing with it leaves the P tokens that there are
        q = query[:, chunk][present].unsqueeze(0)  # [1, P, H, Dk]
        scores, slots, selected, sub_slots = product_key_address(q, keys.unsqueeze(0), config.topk, *score)
        slots = slots.squeeze(0).flatten(-2)  # [P, H*k]
        w = weights(scores.squeeze(0), config.temperature, config.nonlinearity)
        read = memory_read(values, slots, w)
        pieces.append([x.new_zeros(*present.shape, *x.shape[1:]).index_put((present,), x) for x in (read, slots, w)])
        if s >= n_commits:
            continue

        # Token t stores the target of token t+L; the last L tokens of the chunk, and where t+L is masked, have none.
        y = later(torch.where(present.unsqueeze(-1), target[:, chunk], 0.0))[present]
        g = gate[:, chunk][present] * later(present)[present]
        residuals = g.unsqueeze(-1) * (y - read)
        if rounded:
            residuals = residuals.to(torch.bfloat16).to(torch.float64)
        counts = torch.bincount(slots.flatten(), minlength=values.shape[0])  # N_s
        kappa = write_scale(w, config.write_scale, C, L)
        coefficients = config.learning_rate * kappa.unsqueeze(-1) * w / counts[slots]
        values = _value_commit(values, slots, coefficients, residuals)

        chosen = _selected_sub_scores(q.detach(), keys.unsqueeze(0), sub_slots, *score)
        losses.append(addressing_loss(chosen, sub_slots, n).squeeze(0))
        if keys_move:
            rate = config.learning_rate * config.addressing_weight
            keys = key_commit(q, keys.unsqueeze(0), selected, sub_slots, None, rate, *score).squeeze(0)

    output, all_slots, all_weights = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    return _Run(output, all_slots, all_weights, keys, values, losses)


def _packed_sequences(mask: Sequence[bool], reset: Sequence[bool]) -> list[Tensor]:
    """The positions of the tokens of each sequence of a row; an empty one matters only as the last."""
    sequences: list[list[int]] = [[]]
    for t, (is_token, starts) in enumerate(zip(mask, reset, strict=True)):
        if starts:
            sequences.append([])
        if is_token:
            sequences[-1].append(t)
    return [torch.tensor(positions, dtype=torch.int64) for positions in sequences]


def _run_row(
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    mask: Tensor,
    reset: Tensor,
    keys: Tensor,
    values: Tensor,
    config: Any,
    chunk_lengths: Sequence[int] | None,
    training: bool,
    commit_partial: bool,
) -> _Run:
    """The sequences that one row packs (`query [T, H, Dk]` and so on), each alone; the last one's keys and values."""
    sequences = _packed_sequences(mask.tolist(), reset.tolist())
    runs = []
    for i, positions in enumerate(sequences):
        q, y, g, present = (x[positions].unsqueeze(0) for x in (query, target, gate, mask))
        commits = commit_partial and i == len(sequences) - 1
        runs.append(_run(q, y, g, present, keys, values, config, chunk_lengths, training, commits))

    def put_back(parts: list[Tensor]) -> Tensor:
        x = torch.cat(parts, dim=1)
        return x.new_zeros(1, len(gate), *x.shape[2:]).index_copy(1, torch.cat(sequences).to(x.device), x)

    return _Run(
        put_back([run.output for run in runs]),
        put_back([run.slots for run in runs]),
        put_back([run.weights for run in runs]),
        runs[-1].keys,
        runs[-1].values,
        [loss for run in runs for loss in run.losses],
    )


def fast_weight_memory(
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    keys: Tensor,
    values: Tensor,
    config: Any,
    chunk_lengths: Sequence[int] | None = None,
    training: bool = False,
    commit_partial: bool = False,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> Result:
    """Section 2 over a batch of sequences: `query [B, T, H, Dk]`, `target [B, T, Dv]`, `gate [B, T]`.

    The memory starts from `keys [H, 2, n, Dk/2]` or `[M, H, 2, n, Dk/2]` and `values [N, Dv]`. Scope `sequence`: one
    memory a sequence, `M = B`; `shared`: one memory, whose chunks are `C` columns of the batch (`P = B*C` tokens).

    A chunk reads one version of the memory and then commits. The value commit (2.6; equations 13 to 15 of the paper) is
    `V[s] += lr / N_s * sum over the reads (t, j) of slot s of kappa_t w_tj g_t (y_{t+L} - v_t)`, where `N_s` counts all
    the chunk's reads of `s` and the last `L` tokens write nothing. The key commit is 2.7. With `config.log_dtype`
    `bfloat16`, and not `training`, the residuals `g_t (y_{t+L} - v_t)` are rounded to bfloat16 first.

    `chunk_lengths` replaces the grid of `config.chunk_size`; each chunk commits with its own length as `C`. The tokens
    that are left are an open chunk: it reads, and commits only with `commit_partial`. `addressing_loss` is the mean
    over the chunks that committed, of all memories; its gradient reaches the keys of a chunk, not its queries.

    `mask [B, T]` bool: False is no token; output, slots and weights are 0 there. `reset [B, T]` bool: a new sequence
    starts, at the memory that was passed in, before the token there, or before the next one if that is masked. Scope
    `sequence`: a sequence is its tokens in order, as if alone: the masked positions removed, the chunks counted from
    its start, its open chunk left behind by the next sequence of the row. `keys`, `values` and `commit_partial` are
    about the last sequence of every row, which has read nothing where no token follows a reset. Scope `shared` knows no
    `reset`: chunks are columns, masked or not, and a token writes nothing if `t+L` is masked.

    Raises ValueError for a mask or reset that is not `[B, T]` bool, a `reset` in the scope `shared`, `chunk_lengths`
    together with either, and unknown options.
    """
    query, target, gate, keys, values = _double(query, target, gate, keys, values)
    B, T = gate.shape
    shared = config.scope == "shared"
    require_choice("log_dtype", config.log_dtype, ("float32", "bfloat16"))
    for name, given in (("mask", mask), ("reset", reset)):
        if given is not None:
            require_shape(name, given, (B, T))
            require_dtype(name, given, torch.bool)
            require(chunk_lengths is None, "chunk_lengths", chunk_lengths, f"None with {name}")
    require(reset is None or not shared, "reset", "given", "None with scope 'shared'")
    mask = torch.ones_like(gate, dtype=torch.bool) if mask is None else mask
    reset = torch.zeros_like(gate, dtype=torch.bool) if reset is None else reset
    keys = keys.expand(1 if shared else B, *keys.shape[-4:])

    options = config, chunk_lengths, training, commit_partial
    if shared:
        runs = [_run(query, target, gate, mask, keys[0], values, *options)]
    else:
        runs = [_run_row(query[b], target[b], gate[b], mask[b], reset[b], keys[b], values, *options) for b in range(B)]
    losses = [loss for run in runs for loss in run.losses]
    return Result(
        torch.cat([run.output for run in runs]),
        torch.cat([run.slots for run in runs]),
        torch.cat([run.weights for run in runs]),
        torch.stack([run.keys for run in runs]),
        torch.stack([run.values for run in runs]),
        torch.stack(losses).mean() if losses else values.new_zeros(()),
    )
