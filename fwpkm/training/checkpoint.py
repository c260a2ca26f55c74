"""Checkpoints of a training: each one folder that is whole or absent, of safetensors and JSON.

``step-00000100/`` holds the model as ``save_pretrained`` writes it (so that ``from_pretrained`` reads the folder), the
tokenizer if there is one, the optimizer's tensors as ``<parameter>.<name>`` in ``optimizer.tensors`` (of
safetensors' format, but not with its ending: vLLM and others read every ``*.safetensors`` of a folder as weights), and
``training.json``: the rest, and a checksum of every other file. There is no random state: the batch and the random
numbers of a step are functions of the seed, the step and the process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fwpkm.checks import require
from fwpkm.files import atomic_folder, remove_folder

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands.

    Args:
        step: steps done.
        seconds: that they took.
        settings: of the training, as JSON takes them.
        data: the source of its tokens.
    """

    step: int
    seconds: float
    settings: dict[str, Any]
    data: dict[str, Any]


def save(
    folder: Path, state: TrainingState, write_model: Callable[[Path], None], optimizer: dict[str, Tensor], keep: int
) -> None:
    """Add a checkpoint to ``folder``, and delete all but the latest ``keep``.

    Raises:
        OSError: if it could not be written; those that were there are untouched.
    """
    path = path_of(folder, state.step)
    with atomic_folder(path) as unfinished:
        try:
            write_model(unfinished)
            save_file(optimizer, unfinished / "optimizer.tensors")
        except SafetensorError as error:  # what the writer makes of a full disk
            raise OSError(f"cannot write {path}: {error}") from error
        about = {"format": FORMAT, **dataclasses.asdict(state), "sha256": _checksums(unfinished)}
        (unfinished / "training.json").write_text(json.dumps(about, indent=1))
    for old in _all(folder)[:-keep]:
        remove_folder(old)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """The checkpoint of the most steps, if there is one."""
    return max(_all(folder), default=None, key=_step)


def find(path: Path) -> Path:
    """A folder with a model: ``path`` itself, or the latest checkpoint of the training that ``path`` is of.

    Raises:
        ValueError: if there is none.
    """
    found = path if (path / "config.json").exists() else latest(path / "checkpoints")
    if found is None:
        raise ValueError(f"checkpoint is {path}; expected a folder with config.json, or that of a training")
    return found


def read(path: Path) -> TrainingState:
    """Where the training of a checkpoint stands, once all files of the checkpoint have been found whole.

    Raises:
        ValueError: naming the file that is not.
    """
    about_path = path / "training.json"
    try:
        about = json.loads(about_path.read_text())
        form = about.pop("format")
        require(form == FORMAT, f"format of {about_path}", form, "{}", FORMAT)
        checksums = about.pop("sha256")
        state = TrainingState(**about)
    except (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError, KeyError, TypeError) as error:
        raise _damaged(about_path) from error
    found = _checksums(path)
    for name, checksum in checksums.items():
        if found.get(name) != checksum:
            raise _damaged(path / name)
    return state


def read_optimizer(path: Path) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint."""
    return load_file(path / "optimizer.tensors")


def _all(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.exists() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "training.json")
    return {path.name: _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged or missing; delete {path.parent} to go on from the checkpoint before it")
