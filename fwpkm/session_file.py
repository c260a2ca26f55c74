"""Sessions on disk: a folder of memory states, and ``session.json``, which names those that count.

A new state goes to a file of a new name. ``session.json`` is replaced last, and files that it does not name are deleted
only then, so that whatever interrupts this leaves an old session or a new one, whole.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import secrets
from pathlib import Path
from typing import Any

from fwpkm.checks import require
from fwpkm.data.codec import Codec
from fwpkm.files import check_head, checksum, remove_unfinished, write_atomically
from fwpkm.memory import MemoryState
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM
from fwpkm.session import Reading, Session, base_of, settled

FORMAT, VERSION = "fwpkm.Session", 1
NAME = "session.json"


def save_session(session: Session, path: Path) -> int:
    """Write ``session`` to the folder ``path``; returns the bytes that it takes there."""
    ours = not path.exists() or (path.is_dir() and ((path / NAME).exists() or not any(path.iterdir())))
    require(ours, "path", str(path), "a folder with a session, an empty one, or none")
    mark = secrets.token_hex(4)
    names = {str(block): f"memory-{block}-{mark}.safetensors" for block in session.memories}
    content = {
        "model": fingerprint(session.model),
        "memories": names,
        "readings": [dataclasses.asdict(reading) for reading in session.readings],
    }
    head = {"format": FORMAT, "version": VERSION, "checksum": _checksum(content), "session": content}
    try:
        for block, state in session.memories.items():
            state.save(path / names[str(block)])
        write_atomically(path / NAME, json.dumps(head, indent=1))
    except BaseException:
        for name in names.values():
            (path / name).unlink(missing_ok=True)
        raise
    for file in path.glob("memory-*.safetensors"):
        if file.name not in names.values():
            file.unlink()
    remove_unfinished(path)
    return sum((path / name).stat().st_size for name in (NAME, *names.values()))


def load_session(path: Path, model: FwPKMForCausalLM, codec: Codec | None) -> Session:
    """Read the session in the folder ``path``, of ``model``."""
    session = Session(model, codec)
    content = _read(path / NAME)
    found, expected = fingerprint(model), content["model"]
    require(found == expected, "model", found, "the model that {} was saved with, {}", path, expected)
    session.readings = tuple(Reading(**reading) for reading in content["readings"])
    for block, name in content["memories"].items():
        require((path / name).exists(), str(path), f"without {name}", "all files that {} names", NAME)
        session.memories[int(block)] = settled(MemoryState.load(path / name, base_of(model, int(block))))
    return session


def fingerprint(model: FwPKMForCausalLM) -> str:
    """A hash of a model's configuration, as far as it computes by it, and of all its weights."""
    names = sorted(inspect.get_annotations(FwPKMConfig))
    config = json.dumps({name: getattr(model.config, name) for name in names}, sort_keys=True)
    return checksum(model.state_dict(), config)


def _read(path: Path) -> dict[str, Any]:
    """What ``session.json`` holds, once it has been found whole."""
    try:
        head = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a session, or damaged: {error}") from error
    head = head if isinstance(head, dict) else {}
    content: dict[str, Any] = head.get("session", {})
    check_head(path, head, FORMAT, VERSION, _checksum(content))
    return content


def _checksum(content: dict[str, Any]) -> str:
    return checksum({}, json.dumps(content))
