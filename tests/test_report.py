"""The report: pictures, tables and the page, from made-up results."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from fwpkm.files import write_atomically
from fwpkm.report import plots
from fwpkm.report.labels import length_label, percent
from fwpkm.report.page import page, write_page
from fwpkm.report.questions import gate_of_characters
from fwpkm.report.table import markdown_table
from fwpkm.report.theme import DARK, LIGHT, Theme

LENGTHS = [2**power for power in range(10, 21)]
FILLER = 'def parse(line):\n    return [int(x) for x in line.split(",") if x]  # café\n'


def made_up_results(seed: int = 0) -> dict[str, Any]:
    """Results of no demo, in the schema of one."""
    rng = random.Random(seed)

    def share() -> float:
        return rng.choice([0.0, 1.0, rng.random(), rng.random()])

    def recall(model: str, length: int) -> dict[str, Any]:
        far = (length.bit_length() - 11) / 10
        exact = (1 - 0.35 * far**3 * rng.random()) if model == "memory" else max(0.0, 0.08 * rng.random() - 0.06)
        depths = []
        for i in range(8):
            questions = rng.choice([0, 4, 9, 12])
            hits = round(questions * min(1.0, max(0.0, rng.gauss(exact, 0.05 * (exact > 0)))))
            depths.append(
                {
                    "from": i / 8,
                    "to": (i + 1) / 8,
                    "questions": questions,
                    "exact": hits / questions if questions else None,
                }
            )
        load = {
            "writes_per_slot": length / 128,
            "open_gate_writes_per_slot": length / 128 * rng.random() / 9,
            "slots_touched": min(1.0, length / 8192 * 0.97),
        }
        return {
            "model": model,
            "length": length,
            "needles": 8,
            "questions": 64,
            "exact": exact,
            "exact_lower95": max(0.0, exact - 0.06),
            "digits": exact if model == "memory" else 0.1 + 0.05 * rng.random(),
            "depths": depths,
            "seconds": length / 20000,
            "bytes_per_second": 20000 * rng.random(),
            "peak_memory_mb": 300 + 2000 * rng.random(),
            "load": load if model == "memory" else None,
        }

    def training(model: str) -> list[dict[str, Any]]:
        return [
            {
                "step": step,
                "seconds": step / 4,
                "loss": 1.3 + 4 * 0.99**step + 0.05 * rng.random(),
                "answer_loss": 2.3,
                "digit_accuracy": 0.1
                + (0.88 / (1 + 2.7 ** (-(step - 250) / 40)) if model == "memory" else 0)
                + 0.01 * rng.random(),
                "gate": 0.5 - 0.3 * step / 600 if model == "memory" else None,
            }
            for step in range(0, 601, 10)
        ]

    def example(right: bool) -> dict[str, Any]:
        name, number = "".join(rng.choices("abcdef0123", k=4)), str(rng.randrange(100000, 1000000))
        length = rng.choice(LENGTHS)
        needle = f"The secret number for ID-{name} is {number}.\n"
        gates = [0.1 * rng.random() for _ in FILLER.encode()]
        inside = [rng.random() ** (0.2 if 33 < i < 42 or 20 < i < 30 else 2) for i in range(len(needle))]
        return {
            "length": length,
            "depth": rng.random(),
            "distance": rng.randrange(length),
            "question": needle[: needle.index(number) - 1],
            "expected": number,
            "memory": number if right else "000000",
            "control": str(rng.randrange(100000, 1000000)),
            "before": FILLER,
            "needle": needle,
            "after": FILLER,
            "gates": gates + inside + gates,
        }

    results: dict[str, Any] = {
        "version": "0.1.0",
        "command": "fwpkm demo",
        "date": "2026-11-21",
        "machine": {"cpu": "A processor of 2 GHz", "cores": 4, "threads": 2, "python": "3.11.7", "torch": "2.11.0"}
        | {"transformers": "5.17.0"},
        "settings": {
            "hidden_size": 128,
            "layers": 4,
            "layer_types": ["sliding_attention"] * 2,
            "sliding_window": 64,
            "n_subkeys": 32,
            "slots": 1024,
            "topk": 8,
            "chunk_size": 512,
            "key_update": "train_only",
            "write_scale": "exact",
            "query_conv": 16,
            "learning_rate": 0.002,
            "batch_size": 16,
            "seed": 0,
            "steps": 600,
        },
        "parameters": {"memory": 1234567, "control": 1100000},
        "training": {model: training(model) for model in ("memory", "control")},
        "recall": [recall(model, length) for model in ("memory", "control") for length in LENGTHS],
        "overwritten": [
            {
                "model": model,
                "length": length,
                "questions": 32,
                "exact": share(),
                "exact_lower95": 0.0,
                "stale": share(),
            }
            for model in ("memory", "control")
            for length in (2**10, 2**14)
        ],
        "perplexity": [
            {"model": model, "memory": memory, "bytes": 65536, "loss": 1 + rng.random(), "perplexity": 3 + rng.random()}
            for model, memory in (("memory", "on"), ("memory", "off"), ("control", "none"))
        ],
        "examples": [example(right) for right in (True, True, False)],
    }
    return results


@dataclass
class Node:
    """An element of a page; text is a string among its children."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[Node]:
        """The elements with one of these tags at or below this one, in order; with no tag, all."""
        if not tags or self.tag in tags:
            yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.all(*tags)

    def one(self, tag: str) -> Node:
        (only,) = self.all(tag)
        return only

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """A page as nodes; raises where tags are not balanced."""

    VOID = ("img", "link", "meta", "source")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Node("")
        self.open = [self.root]
        self.feed(html)
        self.close()
        assert self.open == [self.root], f"left open: {[node.tag for node in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> repeats an attribute"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in self.VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def cells(table: Node) -> list[list[str]]:
    """The text of a table's body."""
    return [[cell.text for cell in row.all("th", "td")] for row in table.one("tbody").all("tr")]


def by_heading(root: Node, heading: str) -> Node | None:
    """The section with this heading."""
    sections = [node for node in root.all("section") if next(node.all("h2")).text == heading]
    return sections[0] if sections else None


def number(cell: str) -> float:
    """The number that a cell starts with; percentages as shares."""
    value = cell.split()[0].replace(",", "")
    return float(value[:-1]) / 100 if value.endswith("%") else float(value)


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with a dot for every picture."""
    file = io.BytesIO()
    matplotlib.image.imsave(file, np.zeros((1, 2, 3)), format="png")
    monkeypatch.setattr(plots, "png", lambda *_: file.getvalue())


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("draw", "size"),
    [
        (plots.draw_heat_map, (684, 1440)),
        (plots.draw_recall_curve, (612, 1440)),
        (plots.draw_training_curve, (576, 1440)),
    ],
)
def test_pictures(draw: Callable[..., Figure], size: tuple[int, int], theme: Theme) -> None:
    picture = matplotlib.image.imread(io.BytesIO(plots.png(draw, made_up_results(), theme)), format="png")[..., :3]
    assert picture.shape[:2] == size
    ground = np.isclose(picture, to_rgb(theme.card), atol=0.01).all(-1)
    edges = np.concatenate([ground[:3].ravel(), ground[-3:].ravel(), ground[:, :3].ravel(), ground[:, -3:].ravel()])
    assert edges.all(), "something is cut off at the edge"
    assert 0.02 < 1 - ground.mean() < 0.9


def test_pictures_ignore_the_style_of_the_caller() -> None:
    usual = plots.png(plots.draw_training_curve, made_up_results(), LIGHT)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 10, "savefig.bbox": "tight"}):
        assert plots.png(plots.draw_training_curve, made_up_results(), LIGHT) == usual


def test_heat_map_shows_every_cell() -> None:
    results = made_up_results()
    figure = plots.draw_heat_map(results, LIGHT)
    for panel, model in zip(figure.axes, ("memory", "control"), strict=False):
        bins = [entry["depths"] for entry in results["recall"] if entry["model"] == model]
        expected = np.array([[cell["exact"] for cell in column] for column in bins], dtype=float).T
        shown = panel.collections[0].get_array()
        np.testing.assert_array_equal(shown.filled(np.nan), expected)
        assert panel.collections[0].get_clim() == (0, 1)
        hatched = {(round(patch.get_y()), round(patch.get_x())) for patch in panel.patches if patch.get_hatch()}
        assert hatched == {tuple(place) for place in np.argwhere(np.isnan(expected)).tolist()} != set()
        written = {
            (text.get_position()[1] - 0.5, text.get_position()[0] - 0.5): text.get_text() for text in panel.texts
        }
        assert written == {
            (row, column): f"{100 * share:.0f}" for (row, column), share in np.ndenumerate(expected) if share == share
        }


def test_curves_show_the_results() -> None:
    results = made_up_results()
    lines = plots.draw_recall_curve(results, LIGHT).axes[0].lines
    for line, model in zip(lines, ("memory", "control"), strict=False):
        entries = [entry for entry in results["recall"] if entry["model"] == model]
        np.testing.assert_array_equal(line.get_xydata(), [(entry["length"], entry["exact"]) for entry in entries])
        assert line.get_color() == LIGHT.of(model)
    assert list(lines[2].get_ydata()) == [1e-6, 1e-6]

    loss, accuracy = plots.draw_training_curve(results, LIGHT).axes
    drawn = [line.get_ydata().tolist() for line in (*loss.lines, *accuracy.lines[:-1])]
    logs = results["training"]
    assert drawn == [
        [record["loss"] for record in logs["memory"]],
        [record["loss"] for record in logs["control"]],
        [record["digit_accuracy"] for record in logs["memory"]],
        [record["gate"] for record in logs["memory"]],
        [record["digit_accuracy"] for record in logs["control"]],
    ]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_apart(theme: Theme) -> None:
    scale = LinearSegmentedColormap.from_list("share", theme.scale)(np.linspace(0, 1, 50))
    away = -1 if plots.luminance(theme.card) > 0.5 else 1  # the scale leads away from the ground, steadily
    assert all(away * (plots.luminance(b) - plots.luminance(a)) > 0 for a, b in pairwise(scale))
    for ground in (theme.card, theme.ground):
        for name in ("ink", "faint", "memory", "control", "right", "wrong"):
            low, high = sorted((plots.luminance(ground), plots.luminance(getattr(theme, name))))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} is hard to read"


def test_page(tmp_path: Path) -> None:
    results = made_up_results()
    write_page(results, tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    root = Tree(written).root

    assert written.startswith("<!DOCTYPE html>")
    assert root.one("html").attributes["lang"] == "en"
    assert any(meta.attributes.get("name") == "viewport" for meta in root.all("meta"))
    assert "http://" not in written
    assert "https://" not in written
    assert "url(" not in root.one("style").text
    assert "@import" not in root.one("style").text
    assert not list(root.all("script", "iframe", "object"))
    for node in root.all():
        for name in ("src", "srcset", "href"):
            assert (node.attributes.get(name) or "data:").startswith("data:")
    assert all(cell.attributes["scope"] in ("col", "colgroup", "row") for cell in root.all("th"))
    levels = [int(node.tag[1]) for node in root.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))

    figures = list(root.all("figure"))
    assert len(figures) == 3
    for figure in figures:
        image = figure.one("img").attributes
        assert image["width"] == "1440"
        assert len(image["alt"] or "") > 40
        assert figure.one("figcaption").text
        assert figure.one("source").attributes["srcset"] != image["src"]


@pytest.mark.usefixtures("quick_pictures")
def test_page_and_markdown_show_the_numbers() -> None:
    results = made_up_results(seed=1)
    root = Tree(page(results)).root
    section = by_heading(root, "Recall in numbers")
    assert section is not None
    lines = markdown_table(results).splitlines()
    table = [line.strip("| ").split(" | ") for line in lines]
    assert {len(row) for row in table} == {12}
    assert table[1] == ["---:"] * 12
    assert table[2:] == cells(section)

    entries = {(entry["model"], length_label(entry["length"])): entry for entry in results["recall"]}
    assert [row[0] for row in table[2:]] == ["1K", "2K", "4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M"]
    for row in table[2:]:
        ours, other = entries["memory", row[0]], entries["control", row[0]]
        assert number(row[1]) == ours["needles"]
        assert number(row[2]) == ours["questions"]
        for cell, entry in ((row[3], ours), (row[5], other)):
            exact, lower = cell.rstrip(")").split(" (≥ ")
            assert number(exact) == pytest.approx(entry["exact"], abs=0.0011)
            assert number(lower) == pytest.approx(entry["exact_lower95"], abs=0.0011)
        assert number(row[4]) == pytest.approx(ours["digits"], abs=0.0011)
        assert number(row[6]) == pytest.approx(other["digits"], abs=0.0011)
        assert number(row[7]) == pytest.approx(ours["bytes_per_second"], abs=0.51)
        assert number(row[8]) == pytest.approx(ours["peak_memory_mb"], abs=0.51)
        assert number(row[9]) == pytest.approx(ours["load"]["writes_per_slot"], rel=0.01)
        assert number(row[10]) == pytest.approx(ours["load"]["open_gate_writes_per_slot"], rel=0.01)
        assert number(row[11]) == pytest.approx(ours["load"]["slots_touched"], abs=0.0011)

    tiles = [[node.text for node in tile.all("h2", "dd") if node.text] for tile in root.one("header").all("dl")]
    shown = [
        [percent(entries[model, length]["exact"]) for model in ("memory", "control")] for length in ("1K", "128K", "1M")
    ]
    assert tiles == shown

    section = by_heading(root, "Numbers that changed, and ordinary text")
    assert section is not None
    overwritten, perplexity = (cells(table) for table in section.all("table"))
    assert [number(row[-1]) for row in overwritten] == pytest.approx(
        [e["stale"] for e in results["overwritten"]], abs=0.0011
    )
    assert [number(row[-1]) for row in perplexity] == pytest.approx(
        [entry["perplexity"] for entry in results["perplexity"]], abs=0.00051
    )


@pytest.mark.usefixtures("quick_pictures")
def test_hostile_strings_are_escaped() -> None:
    hostile = """</pre><script>alert("1")</script><img src='http://x' onerror=y>&amp;"""
    results = made_up_results()
    for name in ("version", "command", "date"):
        results[name] = hostile
    results["machine"] = {hostile: hostile}
    results["settings"] = {hostile: [hostile, 1], "ratio": 0.25}
    for example in results["examples"]:
        for name in ("question", "expected", "memory", "control", "before", "needle", "after"):
            example[name] = f"\n{hostile}{name}"
        example["gates"] = [0.5] * len(example["before"] + example["needle"] + example["after"])
    written = page(results)
    root = Tree(written).root
    assert "<script" not in written
    assert len(list(root.all("img"))) == 3
    for text, example in zip(root.all("pre"), results["examples"], strict=True):
        assert text.text == example["before"] + example["needle"] + example["after"]
        assert text.one("mark").text == example["needle"]
    assert hostile in root.one("footer").text


@pytest.mark.usefixtures("quick_pictures")
def test_questions_are_judged_and_coloured() -> None:
    results = made_up_results()
    for node, example in zip(Tree(page(results)).root.all("article"), results["examples"], strict=True):
        answers = [answer.text for answer in node.all("dd")]
        assert answers[0] == example["expected"]
        for answer, model in zip(answers[1:], ("memory", "control"), strict=True):
            verdict = "✓ right" if example[model] == example["expected"] else "✗ wrong"
            assert answer == f"{example[model]} {verdict}"
        assert f"{example['distance']:,} bytes before" in node.one("p").text
        shown = [
            (character, span.attributes["title"], span.attributes["style"])
            for span in node.one("pre").all("span")
            for character in span.text
        ]
        text = example["before"] + example["needle"] + example["after"]
        gates = gate_of_characters(text, example["gates"])
        assert shown == [(c, f"gate {gate:.2f}", f"--gate: {gate:.2f}") for c, gate in zip(text, gates, strict=True)]


def test_gate_of_characters() -> None:
    assert gate_of_characters("aé", [0.1, 0.2, 0.4]) == pytest.approx([0.1, 0.3])
    assert gate_of_characters("aé", [0.1, 0.2]) == [0.1, 0.2]  # a byte a character
    assert gate_of_characters("\udcc3é", [0.1, 0.2, 0.4]) == pytest.approx([0.1, 0.3])  # a stray byte
    assert gate_of_characters("\ufffdé", [0.1, 0.2, 0.4]) == pytest.approx([0.1, 0.3])  # replaced
    assert gate_of_characters("ab", [0.1]) == [None, None]
    assert gate_of_characters("", []) == []


@pytest.mark.usefixtures("quick_pictures")
def test_page_shows_what_html_cannot_hold(tmp_path: Path) -> None:
    results = made_up_results()
    results["examples"][0] |= {"before": "\n\0a\r\f\x85\udcff", "needle": "b", "after": "", "gates": [1.0]}
    write_page(results, tmp_path / "page.html")
    text = next(Tree((tmp_path / "page.html").read_bytes().decode()).root.all("pre"))
    assert text.text == "\n␀a␍␌\ufffd\ufffdb"
    assert not any(span.attributes.get("title") for span in text.all("span"))  # one gate for seven bytes fits nothing


def test_short_run(tmp_path: Path) -> None:
    """A run of few lengths, of which the control saw some, without questions to read and with one step of training."""
    results = made_up_results()
    results["recall"] = [entry for entry in results["recall"] if entry["length"] <= 4096][::-1][1:]
    results["training"] = {model: log[:1] for model, log in results["training"].items()}
    results |= {"overwritten": [], "perplexity": [], "examples": []}
    write_page(results, tmp_path / "page.html")
    root = Tree((tmp_path / "page.html").read_text(encoding="utf-8")).root
    assert [tile.one("h2").text for tile in root.one("header").all("div") if tile.attributes["class"] == "card"] == [
        "After 1K bytes",
        "After 2K bytes",
        "After 4K bytes",
    ]
    assert markdown_table(results).splitlines()[-1].count("–") == 2


@pytest.mark.parametrize("content", ["new", b"new"])
@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_file(
    content: str | bytes, interruption: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old é")

    def interrupt(_: int) -> None:
        assert len(list(tmp_path.iterdir())) == 2  # old and unfinished
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(interruption):
            write_atomically(path, content)
    assert path.read_text(encoding="utf-8") == "old é"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(str(path), content)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("quick_pictures")
def test_broken_results_leave_the_old_page(tmp_path: Path) -> None:
    results = made_up_results()
    write_page(results, tmp_path / "page.html")
    old = (tmp_path / "page.html").read_bytes()
    del results["examples"][-1]["gates"]
    with pytest.raises(KeyError, match="gates"):
        write_page(results, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == old


def test_labels() -> None:
    assert [percent(share) for share in (0, 1, 0.5, 0.99999, 0.00001, None)] == [
        "0%",
        "100%",
        "50.0%",
        "99.9%",
        "0.1%",
        "–",
    ]
    assert [length_label(length) for length in (512, 1024, 1536, 131072, 2**20)] == ["512", "1K", "1.5K", "128K", "1M"]
