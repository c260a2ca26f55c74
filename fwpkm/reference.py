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
) -> Result:
    """Section 2 over a batch of sequences: `query [B, T, H, Dk]`, `target [B, T, Dv]`, `gate [B, T]`.

    The memory starts from `keys [H, 2, n, Dk/2]` or `[M, H, 2, n, Dk/2]` and `values [N, Dv]`. Scope `sequence`: one
    memory a sequence, `M = B`; `shared`: one memory, whose chunks are `C` columns of the batch (`P = B*C` tokens).

    A chunk reads one version of the memory and then commits. The value commit (2.6; equations 13 to 15 of the paper) is
    `V[s] += lr / N_s * sum over the reads (t, j) of slot s of kappa_t w_tj g_t (y_{t+L} - v_t)`, where `N_s` counts all
    the chunk's reads of `s` and the last `L` tokens write nothing. The key commit is 2.7.

    `chunk_lengths` replaces the grid of `config.chunk_size`; each chunk commits with its own length as `C`. The tokens
    that are left are an open chunk: it reads, and commits only with `commit_partial`. `addressing_loss` is the mean
    over the chunks that committed and the memories; its gradient reaches the keys of a chunk, not its queries.
    """
    query, target, gate, keys, values = _double(query, target, gate, keys, values)
    B, T = gate.shape
    N, n, L = values.shape[0], keys.shape[-2], config.lookahead
    M = 1 if config.scope == "shared" else B

    def by_memory(x: Tensor) -> Tensor:
        """`[B, c, ...]` to `[M, P, ...]`."""
        return x.transpose(0, 1).flatten(0, 1).unsqueeze(0) if config.scope == "shared" else x

    def by_sequence(x: Tensor) -> Tensor:
        """`[M, P, ...]` to `[B, c, ...]`."""
        return x.squeeze(0).unflatten(0, (-1, B)).transpose(0, 1) if config.scope == "shared" else x

    lengths = [config.chunk_size] * (T // config.chunk_size) if chunk_lengths is None else list(chunk_lengths)
    n_commits = len(lengths)
    if sum(lengths) < T or T == 0:
        lengths.append(T - sum(lengths))
        n_commits += commit_partial

    score = config.score, config.score_eps
    keys_move = config.key_update == "fast" or (config.key_update == "train_only" and training)
    keys = keys.expand(M, *keys.shape[-4:])
    versions = [values] * M
    reads, all_slots, all_weights, losses, start = [], [], [], [], 0
    for s, C in enumerate(lengths):
        if config.detach_every and s > 0 and s % config.detach_every == 0:
            versions = [version.detach() for version in versions]
            if config.key_update != "slow":  # slow keys have no history to cut: they are parameters
                keys = keys.detach()
        chunk = slice(start, start + C)
        start += C

        q = by_memory(query[:, chunk])
        scores, slots, selected, sub_slots = product_key_address(q, keys, config.topk, *score)
        slots = slots.flatten(-2)  # [M, P, H*k]
        w = weights(scores, config.temperature, config.nonlinearity)
        read = torch.stack([memory_read(versions[m], slots[m], w[m]) for m in range(M)])
        reads.append(by_sequence(read))
        all_slots.append(by_sequence(slots))
        all_weights.append(by_sequence(w))
        if s >= n_commits:
            continue

        # Token t stores the target of token t+L of its sequence; the last L tokens of the chunk have none.
        y = target[:, chunk]
        y = by_memory(torch.cat([y[:, L:], torch.zeros_like(y[:, :L])], dim=1))
        has_target = torch.arange(C, device=gate.device) < C - L
        residuals = by_memory(gate[:, chunk] * has_target).unsqueeze(-1) * (y - read)
        kappa = write_scale(w, config.write_scale, C, L)
        for m in range(M):
            counts = torch.bincount(slots[m].flatten(), minlength=N)  # N_s
            coefficients = config.learning_rate * kappa[m].unsqueeze(-1) * w[m] / counts[slots[m]]
            versions[m] = _value_commit(versions[m], slots[m], coefficients, residuals[m])

        losses.append(addressing_loss(_selected_sub_scores(q.detach(), keys, sub_slots, *score), sub_slots, n))
        if keys_move:
            rate = config.learning_rate * config.addressing_weight
            keys = key_commit(q, keys, selected, sub_slots, None, rate, *score)

    loss = torch.stack(losses).mean() if losses else values.new_zeros(())
    output, slots, w = (torch.cat(parts, dim=1) for parts in (reads, all_slots, all_weights))
    return Result(output, slots, w, keys, torch.stack(versions), loss)
