"""Taking the inference step of a model out of Python."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.export import Dim, ExportedProgram

from fwpkm.checks import require
from fwpkm.compile.inference import ABOUT, FORMAT, PIECE, START, TOKEN, VERSION, file_of
from fwpkm.compile.step import Step, sizes_as_if_unknown
from fwpkm.files import atomic_folder
from fwpkm.models import FwPKMForCausalLM


def export(
    model: FwPKMForCausalLM,
    path: str | Path,
    batch: int = 1,
    capacity: int = 4096,
    max_length: int | None = None,
    compiled: bool = True,
) -> None:
    """Write the inference step of ``model``, which :func:`fwpkm.compile.load` reads, as a new folder.

    It holds two programs of ``torch.export``, ``token.program.pt2`` (one token) and ``piece.program.pt2`` (several);
    the same compiled by AOTInductor, ``*.package.pt2``, each with the weights; ``step.json``, which says how they are
    called; and ``start.safetensors``, what of a state does not start at zero.

    Args:
        model: with sliding-window and full attention; its memories are committed first, and its mode stays.
        path: the folder, which must not exist.
        batch: rows.
        capacity: tokens of a row for which a state has room: its size, and the time of a step, grow with it.
        max_length: tokens that a program reads at once; a chunk and one token are the most, and what it is by default.
            With a lookahead above 2 it is 1.
        compiled: also compile the package, which takes a C++ compiler and a minute or more.

    Raises:
        ValueError: for a model that cannot be exported, another ``path``, or numbers out of range.
    """
    path = Path(path)
    require(not path.exists(), "path", path, "a folder that does not exist yet")
    step = Step(model, batch, capacity)
    max_length = step.longest(max_length)

    model.commit()
    training = model.training
    model.eval()
    try:
        programs = {TOKEN: export_program(step, 1)}
        if max_length > 1:
            programs[PIECE] = export_program(step, max_length)
    finally:
        model.train(training)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "inputs": ["input_ids", "state"],
        "outputs": ["logits", "state"],
    } | step.about(max_length)
    with atomic_folder(path) as unfinished:
        (unfinished / ABOUT).write_text(json.dumps(about, indent=1))
        save_file({name: x.cpu() for name, x in step.given().items()}, unfinished / START)
        for name, program in programs.items():
            torch.export.save(program, file_of(unfinished, name, compiled=False))
            if compiled:
                package = file_of(unfinished, name, compiled=True)
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(package),
                    # What calls operators and kernels, not these: optimizing it takes most of the time and gains none.
                    inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
                )


@torch.no_grad()
def export_program(step: Step, max_length: int) -> ExportedProgram:
    """The program of a step that reads one token, or 2 to ``max_length``."""
    state = list(step.start().values())
    tokens = torch.zeros(step.batch, max_length, dtype=torch.int64, device=step.model.device)
    length = {1: Dim("length", min=2, max=max_length)} if max_length > 2 else None
    with sizes_as_if_unknown():
        program = torch.export.export(step, (tokens, state), dynamic_shapes=(length, [None] * len(state)), strict=False)
        program = program.run_decompositions({})  # without regions of their own, which cannot be saved with every size
    for node in program.graph.nodes:
        if node.target is torch.ops.fwpkm.memory_scan.default:
            # AOTInductor passes an empty list of tensors as None. Without an index nothing looks at its levels.
            *others, levels = node.args
            node.args = (*others, levels or [node.args[0]])
    return program
