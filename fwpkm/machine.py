"""What figures are measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

CPU_FILE = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Of this process, as JSON takes it."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """The processor's; where the system has no file of it, what Python knows."""
    text = CPU_FILE.read_text() if CPU_FILE.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
