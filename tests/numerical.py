"""``python -m tests.numerical``: tests marked ``numerical`` under each instruction set that torch has here.

They compare paths that sum in different orders, and in how many lanes and threads a sum is taken changes its last bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SETS = ["default", "avx2", "avx512"]
OPTIONS = ["-m", "numerical", "-p", "no:cacheprovider"]
ENGINE = ["tests/serving/scenarios.py", "--noconftest", "-o", "filterwarnings=default", "--disable-warnings"]


def available() -> list[str]:
    """The instruction sets that torch can be told to use on this machine, the lowest first."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return SETS[: SETS.index(best) + 1] if best in SETS else []


def runs() -> list[tuple[str, int]]:
    """Instruction sets and threads: the lower sets with one thread, the best with two; `make test` has one there."""
    *lower, best = available() or [""]
    return [*((capability, 1) for capability in lower), (best, 2)]


def main() -> int:
    """Run them all, and say which failed; the exit code is how many."""
    failed = []
    for capability, threads in runs():
        name = f"{capability or 'as it is'}, {threads} thread{'s' * (threads > 1)}"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HYPOTHESIS_PROFILE": "brief"}
        if capability:
            environment["ATEN_CPU_CAPABILITY"] = capability
        wanted = [["tests", *(["-n", "2", "--dist", "loadfile"] if threads == 1 else [])]]
        if threads == 1 and find_spec("vllm"):  # whose scenarios have one
            wanted.append(ENGINE)
        start = time.monotonic()
        codes = [
            subprocess.run([sys.executable, "-m", "pytest", *run, *OPTIONS], cwd=ROOT, env=environment).returncode
            for run in wanted
        ]
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        if any(codes):
            failed.append(name)
    print("failed: " + "; ".join(failed) if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
