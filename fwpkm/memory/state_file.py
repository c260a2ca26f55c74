"""Memory states on disk: one safetensors file with a JSON header, whole or absent, and checked before it is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fwpkm.checks import require
from fwpkm.files import check_head, checksum, write_atomically
from fwpkm.memory.appendable import Appendable
from fwpkm.memory.config import MemoryConfig
from fwpkm.memory.fast_weights import FastWeights
from fwpkm.memory.state import COUNTS, MemoryState
from fwpkm.memory.write_log import WriteLog

FORMAT, VERSION = "fwpkm.MemoryState", 1
_FIELDS = ("slots", "coefficients", "residuals", "chunks", "gates")
_SAMPLE = 1024  # rows of the base values that a fingerprint looks at


def save_state(state: MemoryState, path: str | Path) -> None:
    """Write ``state`` to ``path``, without the base values, which :func:`load_state` is given again."""
    state = state.map(Tensor.detach)
    tensors: dict[str, Tensor] = {}
    if not _same(state.keys, state.base.all_keys):
        tensors["keys"] = state.keys
    if state.own_values is not None:
        tensors["own_values"] = state.own_values
    if state.waiting is not None:
        tensors["waiting"] = state.waiting
    if state.log is not None:
        filled = state.per_memory(state.filled)
        width = max(1, int(filled.max()))
        written = torch.arange(width, device=filled.device) < filled.unsqueeze(1)
        for name, x in zip(_FIELDS, state.log.records.tensors, strict=True):
            # what stands behind a memory's last record is nobody's
            tensors[f"log.{name}"] = torch.where(written.view(*written.shape, *(1,) * (x.dim() - 2)), x[:, :width], 0)
    for i, x in enumerate(state.open.columns() if state.open else []):
        tensors[f"open.{i}"] = x
    counts: dict[str, int | None] = {}
    for name in COUNTS:
        count = getattr(state, name)
        counts[name] = None if isinstance(count, Tensor) else count
        if isinstance(count, Tensor):
            tensors[f"count.{name}"] = count
    tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
    header = {
        "config": dataclasses.asdict(state.config),
        "memories": state.memories,
        "columns": state.columns,
        "counts": counts,
        "base": _fingerprint(state.base),
    }
    text = json.dumps(header)
    metadata = {"format": FORMAT, "version": str(VERSION), "state": text, "checksum": checksum(tensors, text)}
    write_atomically(path, save(tensors, metadata))


def load_state(path: str | Path, base: FastWeights) -> MemoryState:
    """Read a state from ``path``, for memories that started from ``base``.

    Raises:
        ValueError: if the file is no state, is damaged, of another version, or of memories with another base.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a memory state, or damaged: {error}") from error
    check_head(Path(path), metadata, FORMAT, VERSION, checksum(tensors, metadata.get("state", "")))
    header: dict[str, Any] = json.loads(metadata["state"])
    found, expected = _fingerprint(base), header["base"]
    require(found == expected, "base", found, "the fast weights that the state of {} started from, {}", path, expected)

    device = base.values.device
    tensors = {name: x.to(device) for name, x in tensors.items()}
    config = MemoryConfig(**header["config"])
    records = [tensors[f"log.{name}"] for name in _FIELDS if f"log.{name}" in tensors]
    window = [tensors[f"open.{i}"] for i in range(3) if f"open.{i}" in tensors]
    columns = header["columns"]
    counts = {name: tensors[f"count.{name}"] if n is None else n for name, n in header["counts"].items()}
    return MemoryState(
        config=config,
        base=base,
        keys=tensors.get("keys", base.all_keys),
        own_values=tensors.get("own_values"),
        log=WriteLog(Appendable.of(records), config.lookahead * columns) if records else None,
        open=Appendable.of(window) if window else None,
        waiting=tensors.get("waiting"),
        memories=header["memories"],
        columns=columns,
        **counts,
    )


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.data_ptr() == y.data_ptr()


def _fingerprint(base: FastWeights) -> dict[str, Any]:
    """Sizes, and a checksum of the keys and of evenly spaced rows of the values."""
    step = max(1, base.values.shape[0] // _SAMPLE)
    sample = {"keys": base.keys.detach(), "values": base.values.detach()[::step]}
    digest = checksum({name: x.cpu().contiguous() for name, x in sample.items()})
    return {"keys": list(base.keys.shape), "values": list(base.values.shape), "checksum": digest}
