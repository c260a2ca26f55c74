"""The tables of ``results/cpu.json``."""

from __future__ import annotations

from benchmarks.markdown import Make, measured_on, milliseconds, of, table, three, time_of
from benchmarks.running import Results
from fwpkm.report.labels import MISSING, count, decimal, length_label

LETTERS = {"topk": "k", "value_dim": "Dv"}


def grids(section: Results) -> str:
    """Every size of every grid."""
    lines = []
    for grid, letter in LETTERS.items():
        rows = {(row["size"], row["backward"]): row for row in section["result"][grid]["rows"]}
        for size in dict.fromkeys(size for size, _ in rows):
            lines.append([f"{letter} = {size}", *(time_of(rows[size, backward]) for backward in (False, True))])
    return table(["", "Forward", "Forward + backward"], lines, "lrr") + f"\n{measured_on(section)}.\n"


def decode(section: Results) -> str:
    """Milliseconds a token, the longest over that after the shortest context, and the mean with commits."""
    rows = section["result"]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    cells = {(row["batch"], row["addresses"], row["context"]): row for row in rows}
    lines = []
    for batch, addresses in dict.fromkeys((row["batch"], row["addresses"]) for row in rows):
        found = [cells[batch, addresses, context] for context in contexts]
        longest, mean = max(row["ratio"] for row in found), found[-1]["mean_of_chunks"]
        lines.append([str(batch), addresses, *map(time_of, found), f"{longest:.2f}×", f"{three(1e3 * mean)} ms"])
    last = [f"Longest over {length_label(contexts[0])}", f"Mean with commits after {length_label(contexts[-1])}"]
    head = ["Batch", "Addresses", *map(length_label, contexts), *last]
    return table(head, lines, "rl" + "r" * (len(contexts) + 2)) + f"\n{measured_on(section)}.\n"


def prefill(section: Results) -> str:
    """Tokens a second by quarter."""
    result = section["result"]
    line = [length_label(result["tokens"]), *map(count, result["tokens_per_second"])]
    head = ["Tokens", "First quarter, tokens/s", "Second", "Third", "Last"]
    return table(head, [line], "rrrrr") + f"\n{measured_on(section)}.\n"


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


TABLES: dict[str, Make] = {
    "grids": of("grids", grids),
    "decode": of("decode", decode),
    "prefill": of("prefill", prefill),
    "parts": of("parts", parts),
    "operators": of("parts", operators),
}
