"""Inference steps at work, exported ones and compiled ones: what runs them is torch and the operators, and no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import fwpkm.ops  # noqa: F401 (a program calls them by name)
from fwpkm.checks import require, require_dtype, require_shape

FORMAT = "fwpkm.Step"
VERSION = 1
ABOUT, START = "step.json", "start.safetensors"
# One token is a program of its own: nothing in it depends on a length, and no chunk is laid out for it.
TOKEN, PIECE = "token", "piece"

Run = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


class InferenceStep:
    """What a model does with some more tokens: ``logits, state = step(input_ids, state)``.

    A state is a dictionary of tensors that is never written to: continuing it twice gives independent results, and
    safetensors saves it.

    Attributes:
        batch: ``B``, rows.
        capacity: tokens of a row for which a state has room.
        max_length: tokens that are read at once; longer pieces are read in several steps.
        vocab_size: ``V``.
        device: where it runs.
    """

    def __init__(self, run: dict[str, Run], about: dict[str, Any], start: dict[str, Tensor]) -> None:
        self._run, self._about, self._given = run, about["state"], start
        self.batch: int = about["batch"]
        self.capacity: int = about["capacity"]
        self.max_length: int = about["max_length"]
        self.vocab_size: int = about["vocab_size"]
        self.device = torch.device(about["device"])

    def start(self) -> dict[str, Tensor]:
        """The state of sequences of which nothing has been read."""
        state = {}
        for name, (shape, dtype) in self._expected().items():
            given = self._given.get(name)
            state[name] = torch.zeros(shape, dtype=dtype, device=self.device) if given is None else given.clone()
        return state

    def __call__(self, input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Read a piece of every row.

        Args:
            input_ids: ``[B, T]`` int64, ``T >= 1``.
            state: from :meth:`start`, or an earlier call.

        Returns:
            ``logits [B, T, V]``, and the state to continue from.

        Raises:
            ValueError: for tokens or a state of another shape or dtype, a token out of range (on a CPU), or more tokens
                than the state has room for.
        """
        self._check(input_ids, state)
        logits, tensors = [], list(state.values())
        for piece in input_ids.split(self.max_length, dim=1):
            run = self._run[TOKEN if piece.shape[1] == 1 else PIECE]
            found, tensors = run(piece.contiguous(), tensors)
            logits.append(found)
        return torch.cat(logits, 1), dict(zip(state, tensors, strict=True))

    def _expected(self) -> dict[str, tuple[list[int], torch.dtype]]:
        return {x["name"]: (x["shape"], getattr(torch, x["dtype"])) for x in self._about}

    def _check(self, input_ids: Tensor, state: dict[str, Tensor]) -> None:
        require_shape("input_ids", input_ids, (self.batch, "T"))
        require_dtype("input_ids", input_ids, torch.int64)
        expected = self._expected()
        require(list(state) == list(expected), "state", list(state), "a state of this program, {}", list(expected))
        for name, (shape, dtype) in expected.items():
            require_shape(f"state[{name!r}]", state[name], shape)
            require_dtype(f"state[{name!r}]", state[name], dtype)
        for name, x in {"input_ids": input_ids, **state}.items():
            require(x.device.type == self.device.type, f"{name}.device", x.device, "{}", self.device)
        # One number a call, which a GPU waits for: past its room a state would be overwritten without an error.
        length, read = input_ids.shape[1], int(state["position"])
        require(length >= 1, "input_ids.shape[1]", length, "at least one token")
        left = self.capacity - read
        require(
            length <= left,
            "input_ids.shape[1]",
            length,
            "at most {}: the state has room for {} tokens, and holds {}",
            left,
            self.capacity,
            read,
        )
        if input_ids.device.type == "cpu":
            low, high = (int(x) for x in input_ids.aminmax())
            inside = low >= 0 and high < self.vocab_size
            require(inside, "input_ids", f"in [{low}, {high}]", "tokens in [0, {})", self.vocab_size)


def load(path: str | Path, compiled: bool = True) -> InferenceStep:
    """Load what :func:`fwpkm.compile.export` has written.

    A program and a package are code: load those only that you would run.

    Args:
        path: the folder.
        compiled: run the compiled package; False for the program, operator by operator.

    Raises:
        ValueError: if the folder holds no exported step, one of another version, or no package.
        OSError: if it cannot be read.
    """
    path = Path(path)
    try:
        about: Any = json.loads((path / ABOUT).read_text())
    except ValueError as error:
        raise ValueError(f"{path / ABOUT} is not JSON: {error}") from error
    known = isinstance(about, dict) and about.get("format") == FORMAT
    require(known, f"the format of {path}", about.get("format") if isinstance(about, dict) else "another", FORMAT)
    require(about["version"] == VERSION, f"the version of {path}", about["version"], "{}", VERSION)
    require(
        about["torch"] == torch.__version__,
        "torch",
        torch.__version__,
        "{}, which {} was made with",
        about["torch"],
        path,
    )
    files = {name: file_of(path, name, compiled) for name in (TOKEN, PIECE)[: 1 + (about["max_length"] > 1)]}
    require(files[TOKEN].exists() or not compiled, "compiled", compiled, "False: {} has no packages", path)
    start = load_file(path / START, device=about["device"])
    run: dict[str, Any]
    if compiled:
        run = {name: torch._inductor.aoti_load_package(str(file)) for name, file in files.items()}
    else:
        run = {name: torch.export.load(file).module() for name, file in files.items()}
    return InferenceStep(run, about, start)


def file_of(path: Path, name: str, compiled: bool) -> Path:
    """Where a program, or what it is compiled to, is."""
    return path / f"{name}.{'package' if compiled else 'program'}.pt2"
