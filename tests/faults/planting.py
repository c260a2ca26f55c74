"""A copy of the tree in which one fault at a time is planted, and pytest in processes that find it there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faults.faults import Fault
from tests.faults.rewriting import rewritten

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out")
# A process is forked from one that has imported these, and nothing of ours, so that it starts at once.
IMPORTED = ["torch", "transformers.modeling_utils", "triton", "hypothesis", "pytest", "typer", "rich"]
# Hypothesis is imported before pytest could rewrite its assertions, which nobody needs.
OPTIONS = ("-p", "no:cacheprovider", "--tb=short", "-W", "ignore::pytest.PytestAssertRewriteWarning")
NO_IMPORT = 97  # exit code where the module itself cannot be imported
OUTCOMES = {0: "survived", 1: "killed", -signal.SIGKILL: "timed out", NO_IMPORT: "not imported"}


class Outcome(NamedTuple):
    """What became of tests that ran with a fault."""

    status: str  # killed, survived, timed out; or what went wrong with the run itself
    by: str  # the test that failed
    seconds: float
    output: str


class Tree:
    """A copy of the tree, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT)
        self._output = folder / "output"
        self._context: Any = get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """``fault`` is in the copy, until the end of the block."""
        path = self.root / fault.file
        text = path.read_text()
        compiled = Path(importlib.util.cache_from_source(str(path)))  # good for sources of its second and its size
        compiled.unlink(missing_ok=True)
        path.write_text(with_fault(text, fault))
        try:
            yield
        finally:
            path.write_text(text)
            compiled.unlink(missing_ok=True)

    def run(
        self, tests: Sequence[str], limit: float, module: str = "fwpkm", options: Sequence[str] = ("-x",)
    ) -> Outcome:
        """Import ``module``, then run ``tests``, for ``limit`` seconds at most."""
        start = time.perf_counter()
        process = self._context.Process(target=_test, args=(self.root, self._output, module, [*options, *tests]))
        process.start()
        process.join(limit)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        output = self._output.read_text(errors="replace")
        status = OUTCOMES.get(process.exitcode, f"pytest exits with {process.exitcode}")
        by = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return Outcome(status, by[1] if by else "", time.perf_counter() - start, output)


def with_fault(text: str, fault: Fault) -> str:
    """A module's text with the fault."""
    try:
        return rewritten(text, fault.function, fault.rule)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{fault.name}: {fault.rule!r} cannot be planted in {fault.file}: {error}") from error


def module_of(fault: Fault) -> str:
    return fault.file.removesuffix(".py").replace("/", ".")


def _test(root: Path, output: Path, module: str, arguments: list[str]) -> None:
    """In a process of its own: everything comes from ``root``, and goes to ``output``."""
    os.setsid()  # what it starts ends with it
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    code = NO_IMPORT
    try:
        os.chdir(root)
        sys.path.insert(0, str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:  # this module's package
            del sys.modules[name]
        importlib.import_module(module)
        code = int(pytest.main([*OPTIONS, *arguments]))
    except BaseException:  # an exit code of 1 is for a test that fails, and for nothing else
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
