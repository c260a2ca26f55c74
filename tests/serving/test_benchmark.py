"""The benchmark of serving runs, and its tables can be made of what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks import tables


@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install fwpkm[vllm]")
def test_it_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", f"--out={tmp_path / 'out.json'}"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=tables.ROOT, capture_output=True, timeout=600)
    assert run.returncode == 0, run.stderr.decode()
    made = tables.everything("serving", json.loads((tmp_path / "out.json").read_text()))
    assert made.count("\n| --") == 5
    assert "python -m benchmarks.serving --quick" in made
