"""What every test runs under: few threads, poisoned memory, a hypothesis profile, a GPU only where asked for."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic algorithms refuse CUDA products
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests/kernels; Triton decides when it is imported, by whoever is first
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

common = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=DirectoryBasedExampleDatabase(Path(__file__).parents[1] / ".hypothesis" / "examples"),
)
settings.register_profile("ci", common, max_examples=40, derandomize=True, database=None)  # what `make test` draws, too
settings.register_profile("brief", settings.get_profile("ci"), max_examples=10)
settings.register_profile("nightly", common, max_examples=300)
once = (Phase.explicit, Phase.generate)
settings.register_profile("faults", settings.get_profile("ci"), phases=once, report_multiple_bugs=False)  # tests.faults
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "ci")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What one test has compiled is nothing to the next: Dynamo counts recompiles of a function over all its users."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (integers: the maximum), so that no test passes by luck.

    Torch offers this together with deterministic algorithms, which on CUDA replace the atomics of `index_add_` and
    others, and change what Inductor generates. A test of run-to-run determinism is marked `unpoisoned`.
    """
    torch.use_deterministic_algorithms(request.node.get_closest_marker("unpoisoned") is None)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def text(tmp_path):
    """A folder of five files of source code."""
    from fwpkm.data.text import standard_library  # not before TRITON_INTERPRET is set

    folder = tmp_path / "text"
    folder.mkdir()
    large = [path for path in standard_library() if path.stat().st_size > 8000]
    for i, path in enumerate(large[:100:20]):
        (folder / f"{i}.py").write_bytes(path.read_bytes()[:8000])
    return folder
