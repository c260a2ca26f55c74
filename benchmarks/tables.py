"""The documentation's tables, made from ``results/cpu.json``: ``python -m benchmarks.tables`` writes them anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fwpkm.files import write_atomically
from fwpkm.report.labels import MISSING, count, decimal, length_label

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/benchmarks.md", "benchmarks/NOTES.md")
SIZES = {"tokens": "T", "n_subkeys": "N", "batch": "B", "topk": "k", "value_dim": "Dv"}
NAMES = {
    "fwpkm": "`fast_weight_memory`",
    "layer": "`layers.FwPKM`, hidden {hidden_size}",
    "plain": "plain PyTorch (a copy of V a commit, autograd)",
    "released": "the released code (plain sum for its embedding bag)",
    "package": "{package}, its own layer and update rule",
}

Results = dict[str, Any]
Tables = dict[str, tuple[str, Callable[[Results], str]]]  # by name: the section, and what makes it a table


def everything(results: Results, tables: Tables | None = None) -> str:
    """All tables of the sections that there are."""
    return "\n".join(
        f"{name}\n\n{make(results[section])}"
        for name, (section, make) in (tables or TABLES).items()
        if section in results
    )


def update(results: Results) -> None:
    """Put the tables between their marks in the documentation."""
    for page in PAGES:
        path = ROOT / page
        write_atomically(path, filled(path.read_text(), results))


def filled(text: str, results: Results, file: str = "cpu.json", tables: Tables | None = None) -> str:
    """The text with every table in it that has marks there, made from ``results``, the content of ``file``."""
    for name, (section, make) in (tables or TABLES).items():
        start, end = f"<!-- {file}: {name} -->\n", f"<!-- end of {name} -->"
        if start in text and section in results:
            before, rest = text.split(start)
            text = f"{before}{start}\n{make(results[section])}\n{end}{rest.split(end, 1)[1]}"
    return text


def paper(section: Results) -> str:
    """Time and memory at the paper's size."""
    result = section["result"]
    lines = []
    for name, label in NAMES.items():
        rows = {row["backward"]: row for row in result["rows"] if row["name"] == name}
        if rows:
            forward, backward = (rows.get(kind, {}) for kind in (False, True))
            times = (f(x) for x in (forward, backward) for f in (time_of, _over))
            lines.append([label.format(**result), *times, _gigabytes(forward), _gigabytes(backward)])
    rates = result["machine_rates"]
    head = ["", "Forward", "", "Forward + backward", "", "Peak of forward", "Peak of both"]
    return table(head, lines, "lrrrrrr") + (
        f"\n{measured_on(section)}. In the same run it copies {rates['copy_gb_per_second']:.1f} GB/s "
        f"and multiplies matrices at {rates['product_gflop_per_second']:.0f} GFLOP/s.\n"
    )


def rates(section: Results) -> str:
    """How far from the machine's own rates: bytes and operations from sizes."""
    result = section["result"]
    lines = [
        [
            NAMES[row["name"]].format(**result),
            "forward + backward" if row["backward"] else "forward",
            decimal(row["bytes"] / 1e6),
            decimal(row["gb_per_second"]),
            decimal(row["flops"] / 1e9),
            decimal(row["gflop_per_second"]),
        ]
        for row in result["rows"]
        if "bytes" in row
    ]
    machine = result["machine_rates"]
    measured = (machine["copy_gb_per_second"], machine["product_gflop_per_second"])
    lines.append(
        ["the machine", "large copy, matrix product", MISSING, decimal(measured[0]), MISSING, decimal(measured[1])]
    )
    return table(["", "", "MB", "GB/s", "GFLOP", "GFLOP/s"], lines, "llrrrr")


def grids(section: Results) -> str:
    """Every size of every grid."""
    result, lines = section["result"], []
    for grid, letter in SIZES.items():
        rows = {(row["name"], row["backward"], row["size"]): row for row in result[grid]["rows"]}
        for size in dict.fromkeys(size for _, _, size in rows):
            names = ("fwpkm", "plain", "released")
            found = [rows.get((name, kind, size), {}) for name in names for kind in (False, True)]
            shown = f"{letter} = {size**2 if letter == 'N' else size:,}"
            lines.append([shown, *map(time_of, found), *map(_megabytes, found[1::2])])
    columns = (f"{name}{what}" for name in ("", "Plain: ", "Released: ") for what in ("forward", "both"))
    head = ["", *columns, "Peak of both", "Plain: peak", "Released: peak"]
    return table([x[:1].upper() + x[1:] for x in head], lines, "lrrrrrrrrr")


def growth(section: Results) -> str:
    """Exponents over tokens and slots."""
    lines = [
        [
            SIZES[grid],
            NAMES[row["name"]],
            "forward + backward" if row["backward"] else "forward",
            f"{row['seconds']:.2f}",
            f"{row['largest_over_smallest']:.2f}×",
            MISSING if row["peak_bytes"] is None else f"{row['peak_bytes']:.2f}",
        ]
        for grid in SIZES
        for row in section["result"][grid]["growth"]
    ]
    return table(["Over", "", "", "Exponent of time", "Largest over smallest", "Exponent of memory"], lines, "lllrrr")


def decode(section: Results) -> str:
    """Milliseconds a token, the longest over that after the shortest context, and the mean with commits."""
    rows = section["result"]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    cells = {(row["batch"], row["addresses"], row["context"]): row for row in rows}
    lines = []
    for batch, addresses in dict.fromkeys((row["batch"], row["addresses"]) for row in rows):
        found = [cells[batch, addresses, context] for context in contexts]
        longest, mean = max(row["ratio"] for row in found), found[-1]["mean_of_chunks"]
        lines.append([str(batch), addresses, *map(time_of, found), f"{longest:.2f}×", f"{_three(1e3 * mean)} ms"])
    last = [f"Longest over {length_label(contexts[0])}", f"Mean with commits after {length_label(contexts[-1])}"]
    return table(["Batch", "Addresses", *map(length_label, contexts), *last], lines, "rl" + "r" * (len(contexts) + 2))


def prefill(section: Results) -> str:
    """Tokens a second by quarter."""
    result = section["result"]
    line = [length_label(result["tokens"]), *map(count, result["tokens_per_second"])]
    return table(["Tokens", "First quarter, tokens/s", "Second", "Third", "Last"], [line], "rrrrr")


def parts(section: Results) -> str:
    """The roofline: what each part has to do, the least it can take, and what it takes."""
    result = section["result"]
    lines = []
    for part in result["parts"]:
        least, now = part["least_seconds"], part["seconds"]
        lines.append(
            [
                part["name"],
                f"`{part['operator']}`",
                decimal(part["bytes"] / 1e6),
                decimal(part["flops"] / 1e9),
                milliseconds(least),
                milliseconds(now),
                f"{now / least:.1f}×" if now and least else MISSING,
            ]
        )
    total = sum(part["least_seconds"] for part in result["parts"])
    whole = result["whole"]["seconds"]
    lines.append(["forward + backward", "", "", "", milliseconds(total), milliseconds(whole), f"{whole / total:.1f}×"])
    head = ["Part", "Operator", "MB", "GFLOP", "Least", "Now", "Now over least"]
    rates = result["rates"]
    return table(head, lines, "llrrrrr") + (
        f"\n{measured_on(section)}. Least: at {rates['copy_gb_per_second']:.1f} GB/s and "
        f"{rates['product_gflop_per_second']:.0f} GFLOP/s, the slower of the two.\n"
    )


def operators(section: Results) -> str:
    """The profiler's view: each operator, and the ATen operators that it spends most on."""
    lines = []
    for name, operator in section["result"]["operators"].items():
        spent = ", ".join(f"`{aten}` {1e3 * seconds:.1f}" for aten, seconds in operator["aten"].items())
        lines.append([f"`{name}`", str(operator["calls"]), milliseconds(operator["seconds"]), spent])
    return table(["Operator", "Calls", "Time", "Most of it, each by itself, in ms"], lines, "lrrl")


TABLES: Tables = {
    "paper": ("paper", paper),
    "rates": ("paper", rates),
    "grids": ("grids", grids),
    "growth": ("grids", growth),
    "decode": ("decode", decode),
    "prefill": ("prefill", prefill),
    "parts": ("parts", parts),
    "operators": ("parts", operators),
}


def table(head: Sequence[str], lines: Sequence[Sequence[str]], alignment: str) -> str:
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def _over(row: Results) -> str:
    return f"{row['over_fwpkm']:.3g}×" if row else MISSING


def time_of(row: Results) -> str:
    """The median with its quartiles."""
    if not row:
        return MISSING
    low, high = row["quartiles"]
    if row["seconds"] >= 1:
        return f"{row['seconds']:.2f} s ({low:.2f}–{high:.2f})"
    return f"{_three(1e3 * row['seconds'])} ms ({_three(1e3 * low)}–{_three(1e3 * high)})"


def _three(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def milliseconds(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{_three(1e3 * seconds)} ms"


def _gigabytes(row: Results) -> str:
    peak = row.get("peak_bytes")
    return MISSING if peak is None else f"{peak / 1e9:.2f} GB"


def _megabytes(row: Results) -> str:
    peak = row.get("peak_bytes")
    return MISSING if peak is None else f"{peak / 1e6:.0f} MB"


def measured_on(section: Results) -> str:
    where = section["where"]
    machine = where["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {where['date']}, "
        f"load {where['load_before']:.1f} before the run"
    )


if __name__ == "__main__":
    update(json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text()))
