"""The benchmark of serving runs, and its tables are those of the committed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks import serving


def test_the_tables_are_the_committed_results():
    assert serving.markdown(json.loads(serving.OUT.read_text())) in serving.PAGE.read_text()


@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install fwpkm[vllm]")
def test_it_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", f"--out={tmp_path / 'out.json'}"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=serving.PAGE.parents[1], capture_output=True, timeout=600)
    assert run.returncode == 0, run.stderr.decode()
    assert set(json.loads((tmp_path / "out.json").read_text())) == set(json.loads(serving.OUT.read_text()))
