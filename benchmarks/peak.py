"""Peak memory beyond the inputs, in a process of its own: ``python -m benchmarks.peak`` and a JSON object."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.subjects import subject

ROOT = Path(__file__).parents[1]
STATUS = Path("/proc/self/status")


def peak_bytes(name: str, case: Case, backward: bool) -> int | None:
    """The most that a forward (and backward) of ``name`` holds beyond its inputs, the values among them.

    None where the kernel does not say (anything but Linux).
    """
    if not STATUS.exists():
        return None
    asked = {"name": name, "backward": backward, "threads": torch.get_num_threads(), "case": dataclasses.asdict(case)}
    command = [sys.executable, "-m", "benchmarks.peak", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak memory of {name}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout)


def _kilobytes(field: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def _measure(name: str, backward: bool, threads: int, case: dict[str, Any]) -> int:
    torch.set_num_threads(threads)
    size = Case(**case)
    small = dataclasses.replace(size, tokens=4, chunk=2, n_subkeys=size.topk * 2, batch=1)
    subject(name, small)(backward)  # what a first call loads is not counted
    run = subject(name, size)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = _kilobytes("VmRSS")
    run(backward)
    return (_kilobytes("VmHWM") - before) * 1024


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
