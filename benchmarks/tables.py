"""The documentation's tables, from the files in ``results/``: ``python -m benchmarks.tables`` writes them anew.

A page has a table between ``<!-- table: NAME -->`` and ``<!-- end -->``, wherever it wants it; a name begins with that
of its file of results. To add one, name it in :data:`TABLES`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import (
    compile_tables,
    cpu_tables,
    demo_tables,
    evaluation_tables,
    faults_tables,
    peers_tables,
    retention_tables,
    serving_tables,
)
from benchmarks.markdown import Make
from benchmarks.running import Results
from fwpkm.checks import require
from fwpkm.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES: dict[str, Make] = {
    "demo": demo_tables.recall,
    "baselines": demo_tables.baselines,
    "retention/recall": retention_tables.recall,
    "retention/adaptation": retention_tables.adaptation,
    **{f"evaluation/{name}": make for name, make in evaluation_tables.TABLES.items()},
    "serving": serving_tables.everything,
    **{f"peers/{name}": make for name, make in peers_tables.TABLES.items()},
    **{f"cpu/{name}": make for name, make in cpu_tables.TABLES.items()},
    **{f"compile/{name}": make for name, make in compile_tables.TABLES.items()},
    **{f"faults/{name}": make for name, make in faults_tables.TABLES.items()},
}
_MARKED = re.compile(r"^<!-- table: ([^\n]*) -->\n.*?(?:^<!-- (end|table)\b|\Z)", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """All that may have tables."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, folder: Path = RESULTS) -> str:
    """A page with every table in it as the files in ``folder`` have it.

    Raises:
        ValueError: if it names a table that there is not, or does not end one.
    """

    def fill(found: re.Match[str]) -> str:
        name, end = found.groups()
        require(name in TABLES, "table", repr(name), "one of {}", ", ".join(TABLES))
        require(end == "end", f"table: {name}", "without an end", "<!-- end --> after it")
        file = folder / f"{name.split('/')[0]}.json"
        made = TABLES[name](json.loads(file.read_text())) if file.exists() else ""
        return f"<!-- table: {name} -->\n\n{(made or 'Not measured yet.').rstrip()}\n\n<!-- end"

    return _MARKED.sub(fill, text)


def update() -> None:
    """Write all pages whose tables are not those of the results."""
    for page in pages():
        text = page.read_text()
        if (new := filled(text)) != text:
            write_atomically(page, new)


def everything(file: str, results: Results) -> str:
    """All tables of a file of results, with their names."""
    made = {name: make(results) for name, make in TABLES.items() if name.split("/")[0] == file}
    return "\n".join(f"{name}\n\n{text}" for name, text in made.items() if text)


if __name__ == "__main__":
    update()
