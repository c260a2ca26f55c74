"""The tokens that a model is trained and evaluated on, and the batch of each step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from fwpkm.checks import require
from fwpkm.data.codec import Codec, TokenArray
from fwpkm.data.text import Document, split_documents
from fwpkm.files import atomic_file, remove_unfinished, write_atomically


@dataclass(frozen=True)
class Tokens:
    """Text to train on, and text that training never sees.

    Args:
        train: ``[T]``, unsigned integers.
        held_out: ``[T]``.
        bytes_per_token: of the held-out text.
        source: where they come from, as JSON takes it; an interrupted training goes on only with the same.
    """

    train: TokenArray
    held_out: TokenArray
    bytes_per_token: float = 1.0
    source: dict[str, Any] = field(default_factory=dict)


def prepare(folder: Path, documents: Callable[[], Sequence[Document]], codec: Codec, source: dict[str, Any]) -> None:
    """Encode documents into ``folder``, from where :func:`load` maps them into memory.

    The tokens are kept: if they are in ``folder``, the documents are not asked for again.

    Raises:
        ValueError: if ``folder`` holds the tokens of another source, or there are not enough documents.
    """
    about = folder / "tokens.json"
    if about.exists():
        kept = json.loads(about.read_text())["source"]
        require(kept == source, "text", source, "what {} holds, {}, or another folder", folder, kept)
        return
    remove_unfinished(folder)
    train, held_out = split_documents(documents())
    _write(folder / "train.npy", train, codec)
    tokens, size = _write(folder / "held_out.npy", held_out, codec)
    write_atomically(about, json.dumps({"source": source, "bytes_per_token": size / tokens}, indent=1))


def load(folder: Path) -> Tokens:
    """What :func:`prepare` has written, mapped into memory.

    Raises:
        ValueError: naming a file that is damaged.
    """
    about = json.loads((folder / "tokens.json").read_text())
    return Tokens(
        _read(folder / "train.npy"), _read(folder / "held_out.npy"), about["bytes_per_token"], about["source"]
    )


class Encoded(NamedTuple):
    """Documents one after the other."""

    tokens: TokenArray  # [T]
    bytes_per_token: float
    starts: list[int]  # where the documents begin


def encode(documents: Sequence[Document], codec: Codec) -> Encoded:
    """Documents one after the other as tokens.

    Raises:
        ValueError: if they are empty.
    """
    texts = [read() for read in documents]
    size = sum(len(text) + 1 for text in texts)  # what separates texts counts as a byte
    require(size > len(texts), "text", "empty", "text in the {} documents given", len(texts))
    encoded = [codec.document(text) for text in texts]
    starts = np.cumsum([0] + [tokens.size for tokens in encoded[:-1]]).tolist()
    tokens = np.concatenate(encoded)
    return Encoded(tokens, size / tokens.size, starts)


def batch(tokens: TokenArray, seed: int, step: int, rows: int, length: int) -> NDArray[np.int64]:
    """The windows ``[rows, length]`` of a training step, at random places: a function of the arguments alone.

    ``length`` tokens, not one more: a model predicts ``length - 1`` of them, and its memories end with a whole chunk.
    """
    require(tokens.size >= length, "text", f"{tokens.size} tokens long", "at least the {} of a sequence", length)
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, tokens.size - length + 1, rows)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)


def _write(path: Path, documents: Sequence[Document], codec: Codec) -> tuple[int, int]:
    """Encode one document after the other into a ``.npy`` file; how many tokens, of how many bytes."""
    tokens = size = 0

    def header() -> None:
        described = {"descr": np.dtype(codec.dtype).str, "fortran_order": False, "shape": (tokens,)}
        write_array_header_1_0(file, described)  # leaves room for any number of rows

    with atomic_file(path) as file:
        header()
        for read in documents:
            text = read()
            encoded = codec.document(text)
            file.write(encoded.tobytes())
            tokens, size = tokens + encoded.size, size + len(text) + 1  # what separates texts counts as a byte
        file.seek(0)
        header()
    return tokens, size


def _read(path: Path) -> TokenArray:
    try:
        mapped: TokenArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} to make it anew") from error
    return mapped
