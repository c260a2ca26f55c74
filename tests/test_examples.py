"""Every file in examples runs, and prints what it is there to show."""

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

SHOWN = {
    "in_your_block": r"step 60: loss \S+, +(9[5-9]|100)\.\d% of the facts recalled",
    "other_peoples_tools": r"before: [56]\.\d+ nats a byte\n(.*\n)*after : [34]\.\d+ nats a byte",
    "personal_memory": r"4 of 4 recalled; it now knows garage\.txt\.",
    "train_on_your_files": r"\ntrained +: [23]\.\d+ nats a byte\n",
}


PACKAGES = {"other_peoples_tools": ("lm_eval", "peft", "trl")}  # of fwpkm[ecosystem]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_runs_and_shows(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path)])
    with warnings.catch_warnings():
        for package in PACKAGES.get(path.stem, ()):
            warnings.simplefilter("ignore")  # theirs
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
            pytest.importorskip(package, reason=f"{package} is not installed: pip install fwpkm[ecosystem]")
        runpy.run_path(str(path), run_name="__main__")
    assert re.search(SHOWN[path.stem], capsys.readouterr().out)
