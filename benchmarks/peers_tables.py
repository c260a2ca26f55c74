"""The tables of ``results/peers.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.markdown import (
    Make,
    exponent,
    measured_on,
    median_of,
    of,
    over,
    size_of,
    table,
    time_of,
)
from benchmarks.running import Results
from fwpkm.report.labels import MISSING, decimal

GRIDS = {"tokens": "T", "n_subkeys": "N", "batch": "B"}
NAMES = {
    "fwpkm": "`fast_weight_memory`",
    "layer": "`layers.FwPKM`, hidden {hidden_size}",
    "plain": "plain PyTorch (a copy of V a commit, autograd)",
    "released": "the released code (plain sum for its embedding bag)",
    "package": "{package}, its memory",
    "memory_read": "`memory_read`",
    "embedding_bag": "`embedding_bag`",
    "indexing": "indexing, product, sum",
}
SHORT = {"fwpkm": "ours", "plain": "plain", "released": "released", "package": "package"}
ABSENT = {"released": "the released code", "package": "the package"}
PASSES = {False: "forward", True: "forward + backward"}


def paper(section: Results) -> str:
    """Time, memory and state at the paper's size."""
    result = section["result"]
    lines = []
    for name in _names(result):
        forward, both = (_row(result, name, backward) for backward in PASSES)
        times = (make(row) for row in (forward, both) for make in (time_of, over))
        sizes = (size_of(x) for x in (forward.get("peak_bytes"), both.get("peak_bytes"), forward.get("state_bytes")))
        lines.append([NAMES[name].format(**result), *times, *sizes])
    rates = result["machine_rates"]
    head = ["", "Forward", "", "Forward + backward", "", "Peak of forward", "Peak of both", "State of a sequence"]
    return table(head, lines, "lrrrrrrr") + (
        f"\n{_absent([result])}{_left_out(result)}{measured_on(section)}. In the same run the machine copies "
        f"{rates['copy_gb_per_second']:.1f} GB/s and multiplies matrices at "
        f"{rates['product_gflop_per_second']:.0f} GFLOP/s.\n"
    )


def rates(section: Results) -> str:
    """How far from the machine's own rates: bytes and operations from sizes."""
    result = section["result"]
    lines = [
        [
            NAMES[row["name"]].format(**result),
            PASSES[row["backward"]],
            decimal(row["bytes"] / 1e6),
            decimal(row["gb_per_second"]),
            decimal(row["flops"] / 1e9),
            decimal(row["gflop_per_second"]),
        ]
        for row in result["rows"]
        if "bytes" in row
    ]
    machine = result["machine_rates"]
    measured = (decimal(machine[key]) for key in ("copy_gb_per_second", "product_gflop_per_second"))
    copied, multiplied = measured
    lines.append(["the machine", "large copy, matrix product", MISSING, copied, MISSING, multiplied])
    return table(["", "", "MB", "GB/s", "GFLOP", "GFLOP/s"], lines, "llrrrr") + f"\n{measured_on(section)}.\n"


def times(results: Results) -> str:
    """Medians at every size, others with how many times ours."""

    def cells(result: Results, size: int) -> list[str]:
        found = (_row(result, name, backward, size) for backward in PASSES for name in SHORT)
        return [f"{median_of(row)} ({over(row)})" if row.get("over_ours", 1) != 1 else median_of(row) for row in found]

    head = [f"{what}: {name}" for what in ("Forward", "Both") for name in SHORT.values()]
    return _by_size(results, head, cells)


def memory(results: Results) -> str:
    """Peaks of forward and backward, and states, at every size."""

    def cells(result: Results, size: int) -> list[str]:
        return [
            size_of(_row(result, name, backward, size).get(key))
            for backward, key in ((True, "peak_bytes"), (False, "state_bytes"))
            for name in SHORT
        ]

    head = [f"{what}: {name}" for what in ("Peak of both", "State") for name in SHORT.values()]
    return _by_size(results, head, cells)


def growth(results: Results) -> str:
    """Exponents over tokens, slots and batch."""
    keys = ("seconds", "peak_bytes", "state_bytes")
    lines = [
        [
            GRIDS[grid],
            NAMES[row["name"]].format(**results[grid]["result"]),
            PASSES[row["backward"]],
            f"{row['largest_over_smallest']:.2f}×",
            *(exponent(row.get(key)) for key in keys),
        ]
        for grid in _grids(results)
        for row in results[grid]["result"]["growth"]
    ]
    head = ["Over", "", "", "Largest over smallest", "Exponent of time", "of the peak", "of the state"]
    return table(head, lines, "lllrrrr") + f"\n{_measured(results)}" if lines else ""


def faster(results: Results) -> str:
    """Wherever another is as fast as ours, or faster."""
    lines = []
    for grid in _grids(results):
        result = results[grid]["result"]
        for row in result["rows"]:
            if row["name"] != "fwpkm" and row.get("over_ours", 2) <= 1:
                ours = _row(result, "fwpkm", row["backward"], row["size"])
                what = _size(grid, row["size"]), PASSES[row["backward"]], NAMES[row["name"]].format(**result)
                lines.append([*what, median_of(row), median_of(ours), over(row)])
    head = ["", "", "", "Takes", "Ours", "Times ours"]
    return table(head, lines, "lllrrr") + f"\n{_measured(results)}" if lines else ""


def reads(section: Results) -> str:
    """Reads alone, by our operator and PyTorch's."""
    lines = []
    for point in section["result"]:
        case = point["case"]
        size = f"T = {case['tokens']:,}, N = {case['n_subkeys'] ** 2:,}, Dv = {case['value_dim']}"
        for name in dict.fromkeys(row["name"] for row in point["rows"]):
            forward, both = (_row(point, name, backward) for backward in PASSES)
            cells = (make(row) for row in (forward, both) for make in (time_of, over))
            lines.append([size, NAMES[name], *cells, size_of(both.get("peak_bytes"))])
    head = ["", "", "Forward", "", "Forward + backward", "", "Peak of both"]
    return table(head, lines, "llrrrrr") + f"\n{measured_on(section)}.\n"


def _names(result: Results) -> list[str]:
    """Who was measured, in the order of the table."""
    there = {row["name"] for row in result["rows"]}
    return [name for name in NAMES if name in there]


def _row(result: Results, name: str, backward: bool, size: int | None = None) -> Results:
    wanted = name, backward, size
    found = (row for row in result["rows"] if (row["name"], row["backward"], row.get("size")) == wanted)
    return next(found, {})


def _grids(results: Results) -> list[str]:
    """Those that have been measured."""
    return [grid for grid in GRIDS if grid in results]


def _size(grid: str, size: int) -> str:
    return f"{GRIDS[grid]} = {size**2 if grid == 'n_subkeys' else size:,}"


def _by_size(results: Results, head: Sequence[str], cells: Callable[[Results, int], list[str]]) -> str:
    """A line a size of every grid that has been measured."""
    found = {grid: results[grid]["result"] for grid in _grids(results)}
    if not found:
        return ""
    lines = [
        [_size(grid, size), *cells(result, size)]
        for grid, result in found.items()
        for size in dict.fromkeys(row["size"] for row in result["rows"])
    ]
    notes = _absent(list(found.values())) + "".join(_left_out(result, grid) for grid, result in found.items())
    return table(["", *head], lines, "l" + "r" * len(head)) + f"\n{notes}{_measured(results)}"


def _absent(results: Sequence[Results]) -> str:
    """Who is not installed."""
    names = dict.fromkeys(ABSENT.get(name, name) for result in results for name in result["not_installed"])
    return f"Not installed in this run: {', '.join(names)}. " if names else ""


def _left_out(result: Results, grid: str | None = None) -> str:
    """What was not measured, and why."""
    sizes: dict[tuple[str, str, str], list[str]] = {}
    for row in result["rows"]:
        if "left_out" in row:
            found = sizes.setdefault((SHORT[row["name"]], PASSES[row["backward"]], row["left_out"]), [])
            found += [_size(grid, row["size"])] if grid else []
    said = (f"{name}, {what}{' at ' * bool(at)}{', '.join(at)}: {why}" for (name, what, why), at in sizes.items())
    return f"Left out: {'; '.join(said)}. " if sizes else ""


def _measured(results: Results) -> str:
    """What all grids were measured on, in one run or several."""
    places = [results[grid]["where"] for grid in _grids(results)]
    load = {"load_before": max(where["load_before"] for where in places)}
    return "\n".join(f"{place}." for place in dict.fromkeys(measured_on(where | load) for where in places)) + "\n"


TABLES: dict[str, Make] = {
    "paper": of("paper", paper),
    "rates": of("paper", rates),
    "times": times,
    "memory": memory,
    "growth": growth,
    "faster": faster,
    "reads": of("reads", reads),
}
