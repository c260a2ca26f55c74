"""What a training measures, as a file of JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from fwpkm.files import write_atomically

Record = dict[str, Any]


class Metrics:
    """A file with a line for each step, and one for each evaluation, which has ``held_out_loss``.

    Args:
        path: of the file.
        step: where the training goes on; what an interrupted run wrote after that step is dropped.
        active: of several processes, one writes.
    """

    _file: TextIO | None = None

    def __init__(self, path: Path, step: int, active: bool = True) -> None:
        if active:
            kept = [record for record in read(path) if record["step"] <= step]
            write_atomically(path, "".join(_line(record) for record in kept))
            self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def sync(self) -> None:
        """Have everything on the disk, before the checkpoint that it belongs to."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def read(path: Path) -> list[Record]:
    """All records; a last line that was not finished is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
