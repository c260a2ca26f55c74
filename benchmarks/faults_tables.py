"""The tables of ``results/faults.json``: faults that were planted, and whether a test noticed."""

from __future__ import annotations

from collections import Counter

from benchmarks.markdown import Make, measured_on, table
from benchmarks.running import Results


def modules(results: Results) -> str:
    """The score of each module."""
    faults = results["faults"].values()
    planted = Counter(fault["file"] for fault in faults)
    noticed = Counter(fault["file"] for fault in faults if fault["status"] == "killed")
    lines = [[f"`{file}`", str(count), str(noticed[file])] for file, count in planted.items()]
    lines.append(["all", str(planted.total()), str(noticed.total())])
    minutes = sum(fault["seconds"] for fault in faults) / 60
    return table(["Module", "Faults", "Noticed"], lines, "lrr") + (
        f"\n{minutes:.0f} minutes, besides a run without a fault. {measured_on(results)}.\n"
    )


def survivors(results: Results) -> str:
    """What no test noticed, and why."""
    left = {name: fault for name, fault in results["faults"].items() if fault["status"] != "killed"}
    if not left:
        return "None: every fault was noticed.\n"
    lines = [[f"`{name}`", f"`{fault['file']}`", fault["status"], fault["why"]] for name, fault in left.items()]
    return table(["Fault", "Module", "", "Why"], lines, "llll")


TABLES: dict[str, Make] = {"modules": modules, "survivors": survivors}
