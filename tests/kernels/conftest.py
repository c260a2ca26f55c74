"""Kernels run interpreted here, on CPU tensors. Triton decides that when it is imported."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


def pytest_pycollect_makemodule() -> None:
    """Skip what is here where there is no Triton (a hook: pytest takes no skip from the conftest itself)."""
    pytest.importorskip("triton", reason="kernels need Triton, which is there for Linux only")
