"""What vLLM does with the plugin, run once in a process of its own: vLLM binds threads, and patches what it finds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
FILES = [HERE / name for name in ("bookkeeping.py", "bursts.py", "scenarios.py")]
SCENARIOS = [
    x.name
    for file in FILES
    for x in ast.parse(file.read_text()).body
    if isinstance(x, ast.FunctionDef) and x.name[:5] == "test_"
]

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install fwpkm[vllm]")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each scenario, with every set of its parameters, complained about; an empty text if nothing."""
    report = tmp_path_factory.mktemp("scenarios") / "report.xml"
    command = [sys.executable, "-m", "pytest", *map(str, FILES), "--noconftest", "-o", "filterwarnings=default", "-q"]
    options = ["-p", "no:cacheprovider", "--disable-warnings", "--show-capture=no", f"--junitxml={report}"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command + options, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=3000
    )
    assert report.exists(), run.stdout + run.stderr
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").split("[")[0]
        found.setdefault(name, []).append("\n".join(f"{case.get('name')}: {problem.text}" for problem in case))
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(outcomes, scenario):
    complaints = outcomes.get(scenario)
    assert complaints, f"{scenario} did not run"
    assert not any(complaints), "\n".join(complaints)
