"""Where the time goes: the least that each part could take on this machine, and what it takes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import fwpkm
from benchmarks import subjects, timing, work
from benchmarks.cases import Case, Inputs
from fwpkm.ops import memory_read, memory_write_

PRODUCTS = ("aten::bmm", "aten::baddbmm", "aten::mm", "aten::addmm")
NAMESPACE = "fwpkm::"
BREAKDOWN = 6  # ATen operators named for each of ours


def measure(case: Case, inputs: Inputs, repeats: int, machine: timing.Machine) -> dict[str, Any]:
    """Profile forward and backward, and time alone what the profiler cannot tell apart."""
    run = subjects.memory_run(subjects.ours, inputs, case)
    alone = _alone(case, inputs)
    runs = machine.runs() | {"whole": lambda: run(True)} | alone
    seconds = timing.interleaved(runs, repeats)
    rates = machine.rates(seconds)
    operators = _profiled(run, repeats)
    address = operators.get("product_key_address", {})
    products = sum(address.get("aten", {}).get(name, 0.0) for name in PRODUCTS)
    now = {name: statistics.median(seconds[name]) for name in alone}
    if address:
        now |= {"scoring products": products, "top-k": address["seconds"] - products}
    parts = []
    for part in work.parts(case):
        least = max(
            part.bytes / rates["copy_gb_per_second"] / 1e9, part.flops / rates["product_gflop_per_second"] / 1e9
        )
        taken = now.get(part.name, operators.get(part.operator, {}).get("seconds"))
        parts.append(part._asdict() | {"least_seconds": least, "seconds": taken})
    for operator in operators.values():
        largest = sorted(operator["aten"].items(), key=lambda item: -item[1])[:BREAKDOWN]
        operator["aten"] = dict(largest)
    return {"rates": rates, "whole": timing.summary(seconds["whole"]), "parts": parts, "operators": operators}


def _alone(case: Case, inputs: Inputs) -> dict[str, timing.Run]:
    """The parts of the scan by themselves, at the addresses of these inputs, on the whole table of values."""
    with torch.no_grad():
        found = fwpkm.fast_weight_memory(inputs.query, inputs.target, inputs.gate, inputs.weights, case.config)
    slots, weights = found.slots.flatten(0, 1), found.weights.flatten(0, 1)
    values, target = inputs.values.clone(), inputs.target.flatten(0, 1)
    gate, output = inputs.gate.flatten().unsqueeze(1), found.output.flatten(0, 1)
    chunk = case.batch * case.chunk

    def commit() -> None:
        for s in range(case.n_chunks - 1):
            part = slice(s * chunk, (s + 1) * chunk)
            memory_write_(values, slots[part], weights[part], target[part])

    return {
        "gather and sum": lambda: memory_read(values, slots, weights),
        "residual": lambda: gate * (target - output),
        "commit": commit,
    }


def _profiled(run: subjects.Run, repeats: int) -> dict[str, dict[str, Any]]:
    """Of each of our operators: seconds a run, and of those what each ATen operator below it spends itself."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            run(True)
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "calls": 0, "aten": defaultdict(float)})
    for event in profiler.events():
        owner, parent = None, event
        while parent is not None:
            owner = parent if parent.name.startswith(NAMESPACE) else owner
            parent = parent.cpu_parent
        if owner is None:
            continue
        entry = found[owner.name.removeprefix(NAMESPACE)]
        if event is owner:
            entry["seconds"] += event.cpu_time_total / 1e6 / repeats
            entry["calls"] += 1
        entry["aten"][event.name] += event.self_cpu_time_total / 1e6 / repeats
    for entry in found.values():
        entry["calls"] //= repeats
    return dict(found)
