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
from fwpkm.ops import key_commit, memory_read, memory_write_, product_key_address
from fwpkm.ops.product_key_address import by_codebook

NAMESPACE = "fwpkm::"
BREAKDOWN = 6  # ATen operators named for each of ours


def measure(case: Case, inputs: Inputs, repeats: int, machine: timing.Machine) -> dict[str, Any]:
    """Profile forward and backward, and time parts alone."""
    run = subjects.memory_run(subjects.ours, inputs, case)
    alone = _alone(case, inputs)
    runs = machine.runs() | {"whole": lambda: run(True)} | alone
    seconds = timing.interleaved(runs, repeats)
    rates = machine.rates(seconds)
    operators = _profiled(run, repeats)
    now = {name: statistics.median(seconds[name]) for name in alone}
    now["top-k"] = now.pop("address") - now["scoring products"]
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
    """The parts by themselves, at the addresses of these inputs, on the whole table of values; keys as they start."""
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

    keys, size = inputs.weights.all_keys, case.chunk
    chunks = [inputs.query[:, s * size : (s + 1) * size] for s in range(case.n_chunks)]
    found_keys = [product_key_address(chunk, keys, case.topk) for chunk in chunks]
    moved = [(chunk, keys, *selected[2:]) for chunk, selected in zip(chunks, found_keys, strict=True)][:-1]
    halves = [by_codebook(chunk, True) for chunk in chunks]
    grads = [(torch.randn_like(scores), torch.randn_like(sub)) for scores, _, sub, _ in found_keys]
    grad_keys = torch.randn(case.batch, *keys.shape[1:])
    addressed = list(zip(grads, chunks, found_keys, strict=True))

    def address_backward() -> None:
        for grad, chunk, (_, slots, sub_scores, sub_slots) in addressed:
            found = chunk, keys, slots, sub_scores, sub_slots
            torch.ops.fwpkm.product_key_address_backward(*grad, *found, "idw", True)

    return {
        "scoring products": lambda: [torch.bmm(half, keys.flatten(0, 2).mT) for half in halves],
        "address": lambda: [product_key_address(chunk, keys, case.topk) for chunk in chunks],
        "key commit": lambda: [key_commit(*chunk, None, 1.0) for chunk in moved],
        "address, backward": address_backward,
        "key commit, backward": lambda: [
            torch.ops.fwpkm.key_commit_backward(grad_keys, *chunk, None, 1.0, "idw") for chunk in moved
        ],
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
