"""The figures in README and docs are those of the committed result files."""

import json
from pathlib import Path

from fwpkm import variants
from fwpkm.report import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_readme_table_is_the_committed_demo():
    results = json.loads((RESULTS / "demo.json").read_text())
    assert markdown_table(results).strip() in (ROOT / "README.md").read_text()


def test_variants_table_is_the_committed_comparison():
    rows = json.loads((RESULTS / "variants.json").read_text())["rows"]
    assert variants.markdown(rows) in (ROOT / "docs" / "demo.md").read_text()


def blocks(page: str) -> list[str]:
    return [block.split("```")[0] for block in (ROOT / page).read_text().split("```python\n")[1:]]


def test_readme_examples_run_each_by_itself():
    assert len(blocks("README.md")) == 2
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_guide_runs_from_top_to_bottom():
    assert len(blocks("docs/memory.md")) == 4
    exec(compile("\n".join(blocks("docs/memory.md")), "docs/memory.md", "exec"), {})
