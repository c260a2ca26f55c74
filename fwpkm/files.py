"""Files and folders that are whole or absent."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fwpkm.checks import require

_UNFINISHED = re.compile(r"\..+\.unfinished-[0-9a-f]{8}")


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, by way of a new file next to it that takes its place when whole.

    Whatever interrupts this, ``path`` holds what it held before or all of ``content``. Missing folders are made.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A new file to write; it takes the place of ``path`` when the block ends, and is gone if that raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill; it becomes ``path``, which must not exist, when the block ends, and is gone if that raises.

    All its files are on the disk before it has its name.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for entry in (*unfinished.rglob("*"), unfinished):
            _sync(entry)
        unfinished.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder; whatever interrupts this, it is whole or has lost its name."""
    unfinished = _unfinished(path)
    path.rename(unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Delete what interrupted writers have left in ``folder``; none may be at work."""
    for entry in folder.iterdir() if folder.exists() else ():
        if _UNFINISHED.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_head(path: Path, head: Mapping[str, Any], form: str, version: int, expected: str) -> None:
    """Check the ``format``, ``version`` and ``checksum`` that a file says it has.

    Raises:
        ValueError: if it is another file, of another version, or damaged: ``expected`` is the checksum of its content.
    """
    require(head.get("format") == form, f"the format of {path}", head.get("format"), form)
    found = str(head.get("version"))
    require(found == str(version), f"the version of {path}", found, str(version))
    intact = head.get("checksum") == expected
    require(intact, f"the content of {path}", "damaged", "what was saved (its checksum differs)")


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Of names, shapes, dtypes and bytes, and of a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(x.shape)} {x.dtype}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
