"""README and docs: their code runs, and what they name exists."""

import ast
import itertools
import pkgutil
import re
import shlex
import struct
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from safetensors.torch import load_file, save_file
from typer.exceptions import TyperException

import fwpkm.compile
from docs import pictures
from fwpkm.cli import app
from fwpkm.training.processes import whole_model
from tests import children

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")))
}
PROGRAMS = ("accelerate", "fwpkm", "make", "pip", "python", "torchrun", "vllm")
SEVERAL_PROCESSES = "# torchrun"


def blocks(page: str, language: str) -> list[str]:
    return [block.split("```")[0] for block in PAGES[page].split(f"```{language}\n")[1:]]


def programs(page: str) -> list[str]:
    """What a reader runs: each block of the README by itself, other pages from top to bottom."""
    here = [block for block in blocks(page, "python") if not block.startswith(SEVERAL_PROCESSES)]
    return here if page == "README.md" else ["\n".join(here)] if here else []


@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in programs(page):
        exec(compile(program, page, "exec"), {})


def test_examples_are_found():
    assert {"README.md", "docs/index.md", "docs/idea.md", "docs/memory.md"} <= {
        page for page in PAGES if programs(page)
    }
    assert len(blocks("docs/memory.md", "python")) == PAGES["docs/memory.md"].count("```python") > 4


def run_loop(program, out):
    """A loop of docs/training.md, and what it has made of the parameters."""
    torch.use_deterministic_algorithms(True)
    names = {}
    exec(program, names)
    model = names["model"]
    model = getattr(model, "module", model)
    tensors = {name: x for name, x in whole_model(model, keep=True).items() if "memory." not in name}
    save_file(tensors, out / f"{dist.get_rank()}.safetensors")
    dist.destroy_process_group()


def test_loops_in_two_processes(tmp_path):
    """Whole or spread: parameters end the same in both processes, which read different text, and by either way."""
    loops = [block for block in blocks("docs/training.md", "python") if block.startswith(SEVERAL_PROCESSES)]
    ends = []
    for i, loop in enumerate(loops):
        out = tmp_path / str(i)
        out.mkdir()
        children.ranks(2, run_loop, loop, out)
        first, second = (load_file(out / f"{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        ends.append(torch.cat([first[name].flatten() for name in sorted(first)]))
    whole, spread = ends
    assert (whole - spread).abs().mean() < 1e-5  # steps are of 1e-3


def parse(arguments: list[str]) -> None:
    """Parse a command line of ``fwpkm`` without running it."""
    command, context, name = typer.main.get_command(app), None, "fwpkm"
    while True:
        context = command.make_context(name, list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def check_command(words: list[str]) -> None:
    program, *arguments = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)
    assert program in PROGRAMS
    if "fwpkm.cli" in arguments:  # of torchrun and its kin
        program, arguments = "fwpkm", arguments[arguments.index("fwpkm.cli") + 1 :]
    if program == "fwpkm":
        parse(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "python" and arguments[0] == "-m":
        not_everywhere = arguments[1].startswith("vllm.") and not find_spec("vllm")
        assert not_everywhere or find_spec(arguments[1]), arguments[1]
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"fwpkm\[(\S+?)\]", " ".join(arguments))) <= set(extras)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_commands_exist(page):
    for line in "\n".join(blocks(page, "sh")).splitlines():
        for command in line.split("#")[0].split("&&"):
            if words := shlex.split(command):
                check_command(words)


@pytest.mark.parametrize(
    "command", ["fwpkm train out --step 3", "fwpkm trains out", "make tests", "python -m benchmarks.cpus", "run me"]
)
def test_commands_that_do_not_exist_are_noticed(command):
    with pytest.raises((AssertionError, TyperException)):
        check_command(command.split())


def test_links_lead_to_files():
    """As the repository shows the pages; those of the site, and their anchors, are checked when it is built."""
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_named_tests_exist():
    named = {(page, *name) for page in PAGES for name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", PAGES[page])}
    assert sum(page == "docs/faq.md" for page, *_ in named) > 24
    for page, path, name in named:
        functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert name in functions, f"{page}: {path}::{name}"


def test_every_question_has_its_tests():
    questions = PAGES["docs/faq.md"].split("\n## ")[1:]
    assert len(questions) == 12
    assert all("::test_" in question for question in questions)


def test_named_objects_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`(fwpkm(?:\.\w+)+)", text):
            try:
                pkgutil.resolve_name(name)
            except (AttributeError, ImportError):
                pytest.fail(f"{page}: {name}")


def described() -> list[Any]:
    """What the reference pages describe."""
    pages = PAGES["docs/operators.md"] + PAGES["docs/reference.md"]
    return [pkgutil.resolve_name(place) for place in re.findall(r"^::: (\S+)", pages, re.MULTILINE)]


def test_every_public_name_has_its_place():
    places = [*described(), fwpkm.layers, fwpkm.models, fwpkm.ops]
    for package in (fwpkm, fwpkm.ops, fwpkm.layers, fwpkm.models, fwpkm.compile):
        for name in package.__all__:
            assert any(getattr(package, name) is place for place in places), f"{package.__name__}.{name}"


def test_what_is_returned_is_not_taken_for_a_type():
    """Of ``Returns: x: y`` the page would make a type named x."""
    for thing in described():
        first = re.search(r"Returns:\n +(.*)", thing.__doc__)
        assert not first or ": " not in re.sub(":class:", "", first[1]), thing


def test_pictures_are_made(tmp_path):
    pictures.main(tmp_path)
    for name in pictures.PICTURES:
        made, committed = (
            struct.unpack(">II", (folder / f"{name}.png").read_bytes()[16:24]) for folder in (tmp_path, pictures.IMAGES)
        )
        assert made == committed
        assert f"images/{name}.png" in PAGES["docs/idea.md"]
