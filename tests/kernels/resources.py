"""What the kernels take of a GPU when compiled for it, without one: registers, shared memory, spills, width of loads.

``python -m tests.kernels.resources`` compiles every form of every kernel for every GPU generation, prints a table and
writes it to ``tests/kernels/resources.json``, which ``test_ahead_of_time.py`` holds the kernels to.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import fwpkm.ops.kernels

COMMITTED = Path(__file__).with_name("resources.json")
GENERATIONS = (80, 90, 100)


def names() -> Iterator[tuple[str, str]]:
    """Module and form of all that is to be compiled; modules whose name starts with ``_`` hold no kernel."""
    for module in pkgutil.iter_modules(fwpkm.ops.kernels.__path__):
        if not module.name.startswith("_"):
            for form in import_module(f"fwpkm.ops.kernels.{module.name}").forms():
                yield module.name, form.name


def measure() -> dict[str, Any]:
    """Compile everything, in two processes."""
    import triton

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        tasks = [(*name, generation) for name in names() for generation in GENERATIONS]
        forms = {f"{m} {f} sm_{g}": row for (m, f, g), row in zip(tasks, pool.map(compile_form, tasks), strict=True)}
    return {"triton": triton.__version__, "forms": forms}


def compile_form(task: tuple[str, str, int]) -> dict[str, Any]:
    """Compile one form for one generation, and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fwpkm.ops.kernels._forms import OPTIONS

    module, name, generation = task
    (form,) = (f for f in import_module(f"fwpkm.ops.kernels.{module}").forms() if f.name == name)
    arguments = form.kernel.arg_names
    source = ASTSource(
        fn=form.kernel,
        signature={argument: form.types.get(argument, "constexpr") for argument in arguments},
        constexprs=form.constants,
        attrs={(arguments.index(argument),): [["tt.divisibility", 16]] for argument in form.aligned},
    )
    options = OPTIONS | {"num_warps": form.num_warps, "num_stages": form.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": load_widths(code),
        "wide": form.wide,
    }


def load_widths(code: str) -> dict[str, int]:
    """Of disassembled code, how many loads from device memory there are of each width in bytes, widest first."""
    widths: Counter[int] = Counter()
    for suffixes in re.findall(r"\bLDG(?!DEPBAR)(\S*)", code):
        kinds = suffixes.split(".")
        (width,) = [size for kind, size in _BYTES.items() if kind in kinds] or [4]
        widths[width] += 1
    return {str(width): widths[width] for width in sorted(widths, reverse=True)}


_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(resources: dict[str, Any]) -> str:
    lines = [f"{'kernel, form, generation':48} registers shared spills loads"]
    for name, row in resources["forms"].items():
        loads = ", ".join(f"{count} of {width} B" for width, count in row["loads"].items())
        lines.append(f"{name:48} {row['registers']:9} {row['shared']:6} {row['spills']:6} {loads}")
    return "\n".join(lines)


def measured_elsewhere(file: Path) -> dict[str, Any]:
    """:func:`measure`, in a process that compiles: this one may be interpreting kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-m", __name__, str(file)], check=True, env=environment)
    return json.loads(file.read_text())


if __name__ == "__main__":
    resources = measure()
    (Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED).write_text(json.dumps(resources, indent=1) + "\n")
    print(table(resources))
