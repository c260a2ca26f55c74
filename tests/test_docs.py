"""The figures in README and docs are those of the committed result files."""

import json
from pathlib import Path

import pytest

from benchmarks import evaluation
from fwpkm.report import baselines_table, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_readme_table_is_the_committed_demo():
    results = json.loads((RESULTS / "demo.json").read_text())
    assert markdown_table(results).strip() in (ROOT / "README.md").read_text()


def test_baselines_table_is_the_committed_comparison():
    rows = json.loads((RESULTS / "baselines.json").read_text())["rows"]
    assert baselines_table(rows) in (ROOT / "docs" / "evaluation.md").read_text()


def test_evaluation_tables_are_the_committed_figures():
    page, results = (ROOT / "docs" / "evaluation.md").read_text(), json.loads((RESULTS / "evaluation.json").read_text())
    assert results.keys() == evaluation.RUNS.keys()
    for name, (section, make) in evaluation.TABLES.items():
        assert f"<!-- evaluation.json: {name} -->\n\n{make(results[section])}\n<!-- end of {name} -->" in page


@pytest.mark.parametrize(
    ("page", "count", "separate"),
    [("README.md", 2, True), ("docs/memory.md", 6, False), ("docs/training.md", 1, True), ("docs/compile.md", 1, True)],
)
def test_examples_run(page, count, separate, tmp_path, monkeypatch):
    """Each block by itself, or a page from top to bottom."""
    blocks = [block.split("```")[0] for block in (ROOT / page).read_text().split("```python\n")[1:]]
    assert len(blocks) == count
    monkeypatch.chdir(tmp_path)
    for block in blocks if separate else ["\n".join(blocks)]:
        exec(compile(block, page, "exec"), {})
