"""The operators and the memory on a GPU: time, bytes a second, and the share of what the GPU copies in the same run.

``python -m benchmarks.gpu``. Every operator is first compared with its composition of ATen calls in float64, the whole
memory with the plain one in float64, and that (benchmarks/check.py) with the reference.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import check, plain, released, running, subjects
from benchmarks.cases import Case, Inputs, safe_inputs
from fwpkm import ops
from fwpkm.checks import require
from fwpkm.files import write_atomically
from fwpkm.memory.formulas import reads_of_slot
from fwpkm.report.labels import length_label

RESULTS = Path(__file__).parent / "results" / "gpu.json"
FLOAT, HALF, SLOT = 4, 2, 8
PAPER = Case()
console = Console(stderr=True)

Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run measures. The defaults are those of committed results."""

    case: Case = PAPER
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # of texts of ``case.tokens``: B * T from 2K to 64K
    repeats: int = 20
    slow_repeats: int = 3  # of what takes seconds
    copy_megabytes: int = 1024
    flush_megabytes: int = 256  # written before every repeat, so that nothing is in a cache from the one before


QUICK = Settings(
    case=Case(tokens=32, n_subkeys=16, key_dim=16, value_dim=16, topk=4, chunk=16),
    batches=(1, 2),
    repeats=2,
    slow_repeats=1,
    copy_megabytes=1,
    flush_megabytes=1,
)


class Subject(NamedTuple):
    """Something to be timed: what it has to move and to compute at the least."""

    run: Callable[[], object]
    bytes: int
    flops: int


def main(
    quick: running.Quick = False,
    device: Annotated[str, typer.Option(help="cuda; or cpu, together with --quick.")] = "cuda",
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS,
) -> None:
    """Compare, measure, and write a JSON file."""
    require(device == "cpu" or torch.cuda.is_available(), "--device", device, "a CUDA GPU, and torch finds none")
    require(device != "cpu" or quick, "--device", device, "cuda: figures of a CPU are those of benchmarks.cpu")
    require(not quick or out != RESULTS, "--quick", "given", "together with --out: its figures are not to be committed")
    results = run(QUICK if quick else Settings(), torch.device(device))
    write_atomically(out, json.dumps(results, indent=1) + "\n")
    Console().print(table(results))


def run(settings: Settings, device: torch.device) -> Results:
    """Measure every size.

    Raises:
        WrongResultError: if something to be measured is wrong.
    """
    check.check_plain()
    clock = Clock(device, settings)
    rows = []
    for batch in settings.batches:
        case = dataclasses.replace(settings.case, batch=batch)
        console.print(f"measuring {length_label(batch * case.tokens)} tokens", style="dim")
        rows += _measure(case, settings, device, clock)
    return {
        "where": where(device),
        "case": dataclasses.asdict(settings.case),
        "copy_gb_per_second": clock.copy_gb_per_second,
        "rows": rows,
    }


def where(device: torch.device) -> Results:
    """What the figures were measured on, and when, by which command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "implementation": ops.implementation(device),
        "versions": {package: version(package) for package in ("torch", "fwpkm")} | {"triton": _triton_version()},
        "cuda": torch.version.cuda,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
    }


def _triton_version() -> str | None:
    try:
        return version("triton")
    except ImportError:
        return None


class Clock:
    """Seconds of a run with cold caches, by the GPU's own events; and what the GPU copies in the same run."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self.device, self.settings = device, settings
        self._flushed = torch.empty(settings.flush_megabytes * 2**20, dtype=torch.uint8, device=device)
        self._source = torch.rand(settings.copy_megabytes * 2**18, device=device)
        self._target = torch.empty_like(self._source)
        self._copies: list[float] = []

    @property
    def copy_gb_per_second(self) -> float:
        """Bytes read and written by a large copy."""
        return 2 * self._source.nbytes / statistics.median(self._copies) / 1e9

    def seconds(self, subjects_: Mapping[str, Subject], repeats: int) -> dict[str, list[float]]:
        """All once, then all again, with a copy among them; the first time is not counted."""
        found: dict[str, list[float]] = {name: [] for name in subjects_}
        for i in range(repeats + 1):
            copied = self._once(lambda: self._target.copy_(self._source))
            if i:
                self._copies.append(copied)
            for name, subject in subjects_.items():
                taken = self._once(subject.run)
                if i:
                    found[name].append(taken)
        return found

    def _once(self, run_it: Callable[[], object]) -> float:
        self._flushed.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            run_it()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run_it()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def _measure(case: Case, settings: Settings, device: torch.device, clock: Clock) -> list[Results]:
    inputs, _ = safe_inputs(case)
    inputs = inputs.to(device)
    operators = operator_subjects(case, inputs)
    wholes, slow = whole_subjects(case, inputs)
    seconds = clock.seconds(operators | wholes, settings.repeats) | clock.seconds(slow, settings.slow_repeats)
    rows = []
    for name, subject in (operators | wholes | slow).items():
        median = statistics.median(seconds[name])
        rows.append(
            {
                "name": name,
                "tokens": case.batch * case.tokens,
                "seconds": median,
                "least_and_most": [min(seconds[name]), max(seconds[name])],
                "bytes": subject.bytes,
                "flops": subject.flops,
                "gb_per_second": subject.bytes / median / 1e9,
                "share_of_copy": subject.bytes / median / 1e9 / clock.copy_gb_per_second,
            }
        )
    return rows


def composition() -> AbstractContextManager[object]:
    """Operators run as compositions of ATen calls, in float64 too."""
    return patch("fwpkm.ops._implementation.FORCED", "reference")


def operator_subjects(case: Case, inputs: Inputs) -> dict[str, Subject]:
    """Every operator at this size, compared with its composition in float64; beside reads and writes, plain ones.

    Bytes are those that no cache spares, once each distinct row (docs/kernels.md).
    """
    memories, size, steps = case.batch, case.chunk, case.n_chunks
    width, fanout, tokens = case.value_dim, case.heads * case.topk, case.batch * case.tokens
    query, keys, values = inputs.query, inputs.keys.unsqueeze(0), inputs.values
    scores, slots, _, _ = ops.product_key_address(query, keys, case.topk)
    slots = slots.flatten(2)
    weights = scores.flatten(2).softmax(-1)
    flat, flat_weights = slots.flatten(0, 1), weights.flatten(0, 1)
    residuals = inputs.target.flatten(0, 1)
    entries, rows = tokens * fanout, int(flat.unique().numel())
    number = torch.arange(tokens, device=flat.device).view(memories, -1) // size
    coefficients = weights * fanout / reads_of_slot(slots, number, case.n_slots)
    coefficients = coefficients.flatten(0, 1)
    chunked = [x.view(memories, steps, size, *x.shape[2:]) for x in (slots, weights, coefficients.view(weights.shape))]
    scan = (*chunked, inputs.target.view(memories, steps, size, width), inputs.gate.view(memories, steps, size))
    chunk_query = query[:, :size]
    found = ops.product_key_address(chunk_query, keys, case.topk)
    sub_scores = plain.sub_scores(query[0], inputs.keys)

    def address(query: Tensor, keys: Tensor) -> Tensor:
        return ops.product_key_address(query, keys, case.topk)[0]

    def best(sub_scores: Tensor) -> Tensor:
        return ops.product_key_topk(sub_scores, case.topk)[0]

    def read(values: Tensor, weights: Tensor) -> Tensor:
        return ops.memory_read(values, flat, weights)

    def written(values: Tensor, coefficients: Tensor, residuals: Tensor) -> Tensor:
        return ops.memory_write_(values.clone(), flat, coefficients, residuals)

    def commit(query: Tensor, keys: Tensor, sub_scores: Tensor) -> Tensor:
        return ops.key_commit(query, keys, sub_scores, found[3], None, 1.0)

    def scanned(values: Tensor, *floats: Tensor) -> Tensor:
        return ops.memory_scan(values, scan[0], *floats)

    row, entry = width * FLOAT, FLOAT + SLOT
    own_slots = slots + torch.arange(memories, device=flat.device).view(-1, 1, 1) * case.n_slots
    scan_rows, stored = int(own_slots.unique().numel()), memories * (steps - 1) * size * fanout
    queries, sub_keys = query.numel() * FLOAT, inputs.keys.nbytes
    chosen = memories * size * case.heads * case.key_dim
    read_bytes, write_bytes = row * (rows + tokens) + entries * entry, row * (2 * rows + tokens) + entries * entry
    half_read_bytes = row * rows + tokens * width * HALF + entries * (HALF + SLOT)
    scan_bytes = row * (2 * scan_rows + 2 * tokens) + 2 * entries * entry
    products, sums = 2 * query.numel() * case.n_subkeys, 2 * entries * width
    # function, arguments, how many of the last of these get a gradient, bytes and operations, bytes of the backward
    compared: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], int, int, int, int]] = [
        ("address", address, (query, keys), 2, queries + sub_keys + 3 * entries * entry, products, 2 * queries),
        ("top-k", best, (sub_scores,), 1, sub_scores.nbytes + entries // memories * entry, 0, sub_scores.nbytes),
        ("read", read, (values, flat_weights), 1, read_bytes, sums, read_bytes),
        ("key commit", commit, (chunk_query, keys, found[2]), 3, chosen * FLOAT + 2 * sub_keys * memories,
         2 * chosen * case.topk, 2 * chosen * FLOAT + 3 * sub_keys * memories),
        ("address, bfloat16 query", address, (query.bfloat16(), keys), 2,
         queries // 2 + sub_keys + 3 * entries * entry, products, queries),
        ("read, bfloat16 weights", read, (values, flat_weights.bfloat16()), 1,
         half_read_bytes, sums, half_read_bytes),
        ("scan", scanned, (values, *scan[1:]), 4, scan_bytes, sums + 2 * stored * width,
         row * (scan_rows + 4 * tokens)),
    ]  # fmt: skip
    subjects_: dict[str, Subject] = {}
    for name, function, floats, wanted, moved, operations, moved_back in compared:
        _compare(name, function, floats)
        subjects_[name] = Subject(partial(_no_grad, function, floats), moved, operations)
        backward = _backward(function, floats, wanted)
        subjects_[f"{name}, backward"] = Subject(backward, moved_back, 2 * operations)
    _compare("write", written, (values, coefficients, residuals))
    target, index = values.clone(), flat.flatten()

    def plain_write() -> Tensor:
        return target.index_add_(0, index, (coefficients.unsqueeze(-1) * residuals.unsqueeze(1)).flatten(0, 1))

    def plain_read() -> Tensor:
        return (values[flat] * flat_weights.unsqueeze(-1)).sum(1)

    def bag() -> Tensor:
        return torch.nn.functional.embedding_bag(flat, values, per_sample_weights=flat_weights, mode="sum")

    write = partial(ops.memory_write_, target, flat, coefficients, residuals)
    subjects_["write"] = Subject(write, write_bytes, sums)
    subjects_["write, index_add_"] = Subject(plain_write, write_bytes, sums)
    subjects_["read, embedding_bag"] = Subject(bag, read_bytes, sums)
    subjects_["read, plain"] = Subject(plain_read, read_bytes, sums)
    return subjects_


def whole_subjects(case: Case, inputs: Inputs) -> tuple[dict[str, Subject], dict[str, Subject]]:
    """The memory and the layer; and, slow, the plain composition and the released code."""
    exact = inputs.to(torch.float64)
    with torch.no_grad():
        expected = plain.fast_weight_memory(exact, case)
    _within("fast_weight_memory", subjects.ours(inputs, case), expected)
    module = subjects.layer(case).to(inputs.query.device)
    hidden = subjects.layer_hidden(case).to(inputs.query.device)
    runs = {
        "fast_weight_memory": subjects.memory_run(subjects.ours, inputs, case),
        "layer": subjects.module_run(module, hidden),
    }
    slow = {"plain PyTorch": subjects.memory_run(plain.fast_weight_memory, inputs, case)}
    if released.folder() and case.batch == 1:
        _within("released", released.Released(inputs, case)(inputs, case), expected)
        slow["released code"] = subjects.memory_run(released.Released(inputs, case), inputs, case)
    return _both(runs), _both(slow)


def _both(runs: Mapping[str, subjects.Run]) -> dict[str, Subject]:
    return {
        f"{name}, {what}": Subject(partial(r, backward), 0, 0)
        for name, r in runs.items()
        for what, backward in (("forward", False), ("forward + backward", True))
    }


def _no_grad(function: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return function(*floats)


def _backward(function: Callable[..., Tensor], floats: tuple[Tensor, ...], wanted: int) -> Callable[[], object]:
    """The backward alone, to the last ``wanted`` of the arguments."""
    leaves = [x.detach().requires_grad_() for x in floats[len(floats) - wanted :]]
    output = function(*floats[: len(floats) - wanted], *leaves)
    cotangent = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, cotangent, retain_graph=True, allow_unused=True)


def _compare(name: str, function: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        have = function(*floats)
        with composition():
            want = function(*(x.double() for x in floats))
    _within(name, have, want)


def _within(name: str, have: Tensor, want: Tensor) -> None:
    """What is returned in half precision may be off by its rounding."""
    error = float((have.detach().double() - want).abs().max() / want.abs().max().clamp_min(1e-30))
    tolerance = max(check.TOLERANCE, torch.finfo(have.dtype).eps if have.itemsize == HALF else 0.0)
    if not error <= tolerance:
        raise check.WrongResultError(f"{name} is off by {error:.2g} of its largest; expected {tolerance:g} at most")


def table(results: Results) -> Table:
    """Milliseconds and shares, a row an operator, a column a size."""
    sizes = list(dict.fromkeys(row["tokens"] for row in results["rows"]))
    cells = {(row["name"], row["tokens"]): row for row in results["rows"]}
    title = f"{results['where']['device']}, copies {results['copy_gb_per_second']:.0f} GB/s; ms (share of that)"
    shown = Table("", *map(length_label, sizes), title=title)
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        shown.add_row(name, *(_cell(cells.get((name, size))) for size in sizes))
    return shown


def _cell(row: Results | None) -> str:
    if row is None:
        return ""
    share = f" ({row['share_of_copy']:.0%})" if row["bytes"] else ""
    return f"{1e3 * row['seconds']:.3g}{share}"


if __name__ == "__main__":
    typer.run(main)
