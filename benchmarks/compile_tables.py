"""The tables of ``results/compile.json``."""

from __future__ import annotations

from benchmarks.markdown import Make, measured_on, of, table, time_of
from benchmarks.running import Results
from fwpkm.report.labels import MISSING, decimal, length_label, percent

NAMES = {None: "without memory layers", "slow": "with, keys `slow`", "fast": "with, keys `fast`"}


def step(section: Results) -> str:
    """A training step compiled and eager."""
    rows = {(row["key_update"], row["compiled"]): row for row in section["result"]["rows"]}
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in rows):
        compiled, eager = rows[kind, True], rows[kind, False]
        over = (f"{row['over_without']:.2f}×" for row in (compiled, eager))
        times = (x for row in zip(map(time_of, (compiled, eager)), over, strict=True) for x in row)
        lines.append([NAMES[kind], *times, f"{compiled['over_eager']:.2f}×"])
    head = ["Model", "Compiled", "over without", "Eager", "over without", "Compiled over eager"]
    size = section["result"]["size"]
    return table(head, lines, "lrrrrr") + (
        f"\nHidden {size['hidden']}, {size['blocks']} blocks, vocabulary {size['vocabulary']:,}, "
        f"batch {size['batch']} of {size['tokens']:,} tokens, memories in blocks "
        f"{', '.join(map(str, size['memories']))} of `n = {size['n_subkeys']}`, `Dk = {size['key_dim']}`, "
        f"`Dv = {size['value_dim']}`, chunks of {size['chunk']} tokens. {measured_on(section)}.\n"
    )


def checkpoint(section: Results) -> str:
    """Steps that keep more or less for the backward."""
    names = {"everything": "everything", "addresses": "addresses (`checkpoint_blocks`)", "nothing": "nothing"}
    lines = [
        [names[row["kept"]], f"{row['bytes'] / 1e6:,.0f} MB", time_of(row), f"{row['over_everything']:.2f}×"]
        for row in section["result"]
    ]
    head = ["Kept within blocks", "Peak memory", "Step", "over everything"]
    return table(head, lines, "lrrr") + f"\n{measured_on(section)}.\n"


def start(section: Results) -> str:
    """The first step of a process."""
    lines = [
        [NAMES[row["key_update"]], row["cache"], f"{row['first']:.1f} s", f"{row['second']:.2f} s"]
        for row in section["result"]
    ]
    head = ["Model", "Inductor's cache", "First step", "Second step"]
    return table(head, lines, "llrr") + f"\n{measured_on(section)}.\n"


def calls(section: Results) -> str:
    """Calls a step, by length."""
    rows = section["result"]
    names = list(dict.fromkeys(name for row in rows for name in row["operators"]))
    lines = [
        [f"`{name}`", *(f"{row['operators'].get(name, 0)}, {percent(row['shares'].get(name, 0.0))}" for row in rows)]
        for name in names
    ]
    lines.append(["ATen, called by the graph", *(str(row["aten"]) for row in rows)])
    lines.append(["ATen, called by operators of ours", *(f"{row['aten_inside']:,}" for row in rows)])
    lines.append(["time in operators of ours", *(percent(sum(row["shares"].values())) for row in rows)])
    head = ["Calls, share of time", *(f"T = {row['tokens']:,}" for row in rows)]
    return table(head, lines, "l" + "r" * len(rows)) + f"\n{measured_on(section)}.\n"


def decode(section: Results) -> str:
    """Time a token, by context."""
    lines = [
        [length_label(row["context"]), time_of(row), f"{row['ratio']:.2f}×", f"{1e3 * row['mean']:.3g} ms"]
        for row in section["result"]
    ]
    head = ["Context", "Time a token", "Over the first", "Mean, with a chunk's commit"]
    return table(head, lines, "rrrr") + f"\n{measured_on(section)}.\n"


def overhead(section: Results) -> str:
    """Microseconds a call."""
    columns = ("overhead_alone", "inference_overhead_alone", "overhead", "inference_overhead", "recorded_overhead")
    lines = [
        [
            f"`{row['name']}`",
            *(MISSING if key not in row else f"{decimal(row[key])} µs" for key in ("direct", *columns)),
        ]
        for row in section["result"]
    ]
    head = ["Operator", "Implementation", "Alone", "… inference", "With it", "… inference", "… recording gradients"]
    return table(head, lines, "lrrrrrr") + f"\n{measured_on(section)}.\n"


TABLES: dict[str, Make] = {
    "step": of("step", step),
    "paper": of("paper", step),
    "checkpoint": of("checkpoint", checkpoint),
    "start": of("start", start),
    "calls": of("calls", calls),
    "decode": of("decode", decode),
    "overhead": of("overhead", overhead),
}
