"""Real text that is on every machine: the sources of Python's standard library."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fwpkm.checks import require

Bytes = NDArray[np.uint8]


def standard_library() -> list[Path]:
    """The ``.py`` files of this Python's standard library, without packages installed beside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))


def text_files(path: Path) -> list[Path]:
    """A file itself, or all files below a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a text file or a folder of text files")
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def load_split(files: list[Path], held_out: float = 0.1) -> tuple[Bytes, Bytes]:
    """Join files to two texts, for training and for evaluation. Which a file belongs to depends on its content only.

    Raises:
        ValueError: if one of the texts is empty.
    """
    contents = sorted({path.read_bytes() for path in files}, key=_digest)
    n_held_out = max(1, round(len(contents) * held_out))
    parts = contents[n_held_out:], contents[:n_held_out]
    train, held = (np.frombuffer(b"\n".join(part), dtype=np.uint8) for part in parts)
    for name, text in (("training text", train), ("held-out text", held)):
        require(text.size > 0, name, "empty", "bytes in the {} files given (at least two different files)", len(files))
    return train, held


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
