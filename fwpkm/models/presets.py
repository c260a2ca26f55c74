"""Models by name, and models described in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fwpkm.checks import require, require_choice
from fwpkm.models.configuration import FwPKMConfig

_COMMON = {
    "sliding_window": 64,
    "fwpkm_chunk_size": 128,
    "fwpkm_query_conv": 16,
    "fwpkm_key_update": "slow",
    "fwpkm_write_scale": "exact",
}
PRESETS: dict[str, dict[str, Any]] = {
    # Two blocks that see 64 tokens, a memory in the first: some 15,000 tokens a second on one CPU core, in training.
    "tiny": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "head_dim": 32,
        "layer_types": ["sliding_attention"] * 2,
        "fwpkm_layers": [0],
        "fwpkm_n_subkeys": 64,
        "fwpkm_key_dim": 96,
        "fwpkm_value_dim": 96,
    },
    # Four blocks, twice as wide, with a larger memory: a quarter of that speed.
    "small": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "head_dim": 32,
        "layer_types": ["sliding_attention"] * 4,
        "fwpkm_layers": [1],
        "fwpkm_n_subkeys": 128,
        "fwpkm_key_dim": 192,
        "fwpkm_value_dim": 192,
    },
}


def preset(name: str, **fields: Any) -> FwPKMConfig:
    """The configuration of that name (:data:`PRESETS`), with ``fields`` of :class:`FwPKMConfig` added."""
    require_choice("preset", name, tuple(PRESETS))
    return FwPKMConfig(**_COMMON | PRESETS[name] | fields)


def read_config(path: Path, **fields: Any) -> FwPKMConfig:
    """A configuration from a JSON file with fields of :class:`FwPKMConfig`; ``fields`` are those it leaves out.

    Raises:
        ValueError: naming what is not JSON, not a field, or not a value that it can have.
    """
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(given, dict), str(path), type(given).__name__, "an object with fields of FwPKMConfig")
    unknown = given.keys() - FwPKMConfig().to_dict().keys()
    require(not unknown, f"field of {path}", ", ".join(sorted(unknown)), "fields of FwPKMConfig")
    try:
        return FwPKMConfig(**fields | given)
    except TypeError as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error
