"""Kernels run interpreted here, on CPU tensors. Triton decides that for the whole process: where there is a GPU, these
tests run by themselves, ``TRITON_INTERPRET=1 make test ARGS=tests/kernels``.
"""

import os

import pytest


def pytest_pycollect_makemodule() -> None:
    """Skip what is here (a hook: pytest takes no skip from the conftest itself)."""
    pytest.importorskip("triton", reason="kernels need Triton, which is there for Linux only")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process: set TRITON_INTERPRET=1 to interpret them")
