"""Peak memory beyond the inputs, in a process of its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import package
from benchmarks.cases import Case
from benchmarks.subjects import subject

STATUS = Path("/proc/self/status")


class DoesNotFitError(Exception):
    """A run needs more memory than it may have."""


def peak_bytes(name: str, case: Case, backward: bool, limit: int) -> int | None:
    """The most that a forward (and backward) of ``name`` holds beyond its inputs, the values among them.

    None where the kernel does not say (anything but Linux).

    Raises:
        DoesNotFitError: if the process needs more than ``limit`` bytes, in all.
    """
    if not STATUS.exists():
        return None
    # a server that has imported everything and run nothing is forked: imports take longer than most measurements
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peak", "fwpkm.demo", "fwpkm.report", package.MODULE])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, name, case, backward, torch.get_num_threads(), limit).result()
        except Exception as error:  # what the package builds on raises torch's in an error of its own
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise DoesNotFitError(f"{name} needs more than {limit / 1e9:g} GB") from None
            raise


def _kilobytes(field: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def _measure(name: str, case: Case, backward: bool, threads: int, limit: int) -> int:
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    small = dataclasses.replace(case, tokens=64, chunk=32, n_subkeys=case.topk * 2, batch=1)
    subject(name, small)(backward)  # what a first call loads is not counted
    run = subject(name, case)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = _kilobytes("VmRSS")
    run(backward)
    return (_kilobytes("VmHWM") - before) * 1024
