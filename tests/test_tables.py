"""The documentation's tables are those of the committed results, and a figure that is not is noticed."""

import json
import re
import shutil

import pytest

from benchmarks import tables

MARK = re.compile(r"^<!-- table: (.*) -->$", re.MULTILINE)


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_pages_have_the_tables_of_the_committed_results(page):
    text = page.read_text()
    assert tables.filled(text) == text, f"{page.name}: run make tables"


def test_every_table_stands_somewhere():
    found = {name for page in tables.pages() for name in MARK.findall(page.read_text())}
    assert found == set(tables.TABLES)


def test_no_other_table_has_figures():
    """A table of times or shares is between marks, or it is copied by hand, and rots."""
    figure = re.compile(r"^\|.*\| \d[\d.,]*( ?(m?s|µs|%|×)).*\|$", re.MULTILINE)
    assert figure.search("| x | 1.2 ms (1–2) |")
    for page in tables.pages():
        text = tables._MARKED.sub("", page.read_text())
        assert not [found[0] for found in figure.finditer(text)], page.name


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_a_planted_figure_is_noticed_in_every_table(page):
    text = page.read_text()
    for found in tables._MARKED.finditer(text):
        digits = [digit for digit in re.finditer(r"\d", text) if found.start() < digit.start() < found.end()]
        for digit in digits[:1] + digits[len(digits) // 2 :][:1] + digits[-1:]:
            planted = f"{text[: digit.start()]}{(int(digit[0]) + 1) % 10}{text[digit.end() :]}"
            assert tables.filled(planted) == text != planted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: cpu/decode -->\n", "without an end"),
        ("<!-- table: cpu/decode -->\n<!-- table: cpu/parts -->\n<!-- end -->\n", "without an end"),
        ("<!-- table: cpu/speed -->\n<!-- end -->\n", "expected one of demo"),
    ],
)
def test_wrong_marks_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tables.filled(text)


def test_what_is_not_measured_is_said(tmp_path):
    text = "<!-- table: cpu/decode -->\n<!-- end -->\nafter"
    assert "Not measured yet." in tables.filled(text, tmp_path)
    assert tables.filled(text, tmp_path).endswith("<!-- end -->\nafter")


def test_serving_says_where_it_was_measured():
    results = json.loads((tables.RESULTS / "serving.json").read_text())
    machine = {"cpu": "a CPU", "threads": 3, "torch": "9"}
    where = {"machine": machine, "date": "today", "command": "c", "load_before": 0.5}
    made = tables.TABLES["serving"](results | {"where": where})
    assert made.endswith("a CPU, 3 threads, torch 9, today, load 0.5 before the run: `c`.\n")


def test_changed_results_are_noticed(tmp_path):
    """The page as it was is not that of other figures."""
    folder = tmp_path / "results"
    shutil.copytree(tables.RESULTS, folder)
    text = (tables.ROOT / "docs" / "demo.md").read_text()
    assert tables.filled(text, folder) == text
    file = folder / "demo.json"
    results = json.loads(file.read_text())
    results["recall"][0]["digits"] /= 2
    file.write_text(json.dumps(results))
    assert tables.filled(text, folder) != text
