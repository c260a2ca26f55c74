"""The least that each part of a memory has to do, from sizes: bytes moved and floating-point operations."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.cases import Case

FLOAT, SLOT = 4, 8


class Part(NamedTuple):
    """A part of the work. Bytes are those that no cache spares: what comes in and goes out once."""

    name: str
    operator: str  # that does it
    backward: bool
    bytes: int
    flops: int


def parts(case: Case) -> list[Part]:
    """The parts of forward and backward, in the order in which they run.

    Commits are those whose result is read: the last chunk's is not. The key commit is a product of the queries with a
    matrix of which only the selected sub-keys' coefficients are not zero; so are the gradients of addresses and key
    commits.
    """
    tokens, commits = case.batch * case.tokens, case.n_chunks - 1
    written = case.batch * commits * case.chunk
    entries, stored = tokens * case.heads * case.topk, written * case.heads * case.topk
    row = case.value_dim * FLOAT
    query = case.heads * case.key_dim * FLOAT
    keys = case.batch * case.n_subkeys * query
    product = 2 * case.heads * case.key_dim * case.n_subkeys
    selected = 2 * case.heads * case.key_dim * case.topk
    sub_scores = tokens * case.heads * 2 * case.n_subkeys * FLOAT
    fast = case.key_update == "fast"
    address, scan, commit = "product_key_scan" if fast else "product_key_address", "memory_scan", "product_key_scan"
    return [
        Part("scoring products", address, False, tokens * query + case.n_chunks * keys, tokens * product),
        Part("top-k", address, False, sub_scores + entries * (FLOAT + SLOT), 0),
        Part("gather and sum", scan, False, entries * row + tokens * row, 2 * entries * case.value_dim),
        Part("residual", scan, False, 3 * written * row, 2 * written * case.value_dim),
        Part("commit", scan, False, 2 * stored * row + written * row, 2 * stored * case.value_dim),
        Part("key commit", commit, False, fast * (written * query + 2 * commits * keys), fast * written * selected),
        # G is read for two results, V is rewound, read, and G is added to (docs/design.md, section 5)
        Part(
            "scan, backward",
            scan + "_backward",
            True,
            (3 * stored + 3 * entries) * row + 4 * tokens * row,
            2 * case.value_dim * (3 * stored + 2 * entries),
        ),
        Part(
            "address, backward",
            address + "_backward",
            True,
            2 * (tokens * query + case.n_chunks * keys),
            2 * tokens * selected,
        ),
        Part(
            "key commit, backward",
            commit + "_backward",
            True,
            fast * (2 * written * query + 3 * commits * keys),
            fast * 2 * written * selected,
        ),
    ]


def total(case: Case, backward: bool) -> tuple[int, int]:
    """Bytes and operations of a forward, or of a forward and a backward."""
    wanted = [part for part in parts(case) if backward or not part.backward]
    return sum(part.bytes for part in wanted), sum(part.flops for part in wanted)


def rates(case: Case, backward: bool, seconds: float) -> dict[str, Any]:
    """The work of a forward (and backward), and how much of it was done a second."""
    moved, operations = total(case, backward)
    return {
        "bytes": moved,
        "flops": operations,
        "gb_per_second": moved / seconds / 1e9,
        "gflop_per_second": operations / seconds / 1e9,
    }
