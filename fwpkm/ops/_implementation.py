"""Which implementation an operator runs: ATen compositions (``reference``) on CPU tensors, Triton kernels on CUDA ones.

``FWPKM_IMPL=reference|triton`` forces one, to find out which of them is wrong; nothing falls back by itself.

Environment variables are read once, when this module is imported: between other work a look at ``os.environ`` takes
about 10 µs, more than all else that is done here.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from fwpkm.checks import require

FORCED = os.environ.get("FWPKM_IMPL", "")
CHECKED = os.environ.get("FWPKM_CHECK", "")

_DEFAULTS = {"cpu": "reference", "cuda": "triton"}


def implementation(device: torch.device | str) -> str:
    """``"reference"`` or ``"triton"``: what every operator runs for tensors on ``device``.

    Raises:
        ValueError: for a device or a value of ``FWPKM_IMPL`` that there is no implementation for.
        RuntimeError: if it is ``triton`` and cannot run: Triton is not installed, or must interpret and was not told.
    """
    kind = torch.device(device).type
    require(kind in _DEFAULTS, "device", device, "a CPU or CUDA device")
    return implementation_on(kind)


def implementation_on(kind: str) -> str:
    """The same for a type of device that is known to be good; it is asked at every call of an operator."""
    if FORCED and FORCED not in _DEFAULTS.values():
        require(False, "FWPKM_IMPL", repr(FORCED), "'reference' or 'triton'")
    chosen = FORCED or _DEFAULTS[kind]
    if chosen == "triton":
        _require_triton(kind)
    return chosen


def checks_values() -> bool:
    """Whether Triton implementations check slots and look for NaN (``FWPKM_CHECK=1``), which waits for the GPU."""
    require(CHECKED in ("", "0", "1"), "FWPKM_CHECK", repr(CHECKED), "'0' or '1'")
    return CHECKED == "1"


@cache
def load(name: str) -> Callable[..., Any]:
    """Import ``"module:function"``: what needs Triton is imported when it is first called."""
    module, function = name.split(":")
    loaded: Callable[..., Any] = getattr(import_module(module), function)
    return loaded


def _require_triton(kind: str) -> None:
    if not _triton_is_installed():
        raise RuntimeError(
            f"operators on {kind} tensors run Triton kernels, and Triton is not installed: pip install"
            " 'triton>=3.6,<3.10', or set FWPKM_IMPL=reference, which is slow on a GPU"
        )
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "FWPKM_IMPL is 'triton' and the tensors are on the CPU, where kernels are only interpreted: set"
            " TRITON_INTERPRET=1 before Python starts, or leave FWPKM_IMPL unset"
        )


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
