"""The texts that evaluations read: by name, as tokens, with what says whether they are still the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fwpkm.cli.subject import Subject
from fwpkm.data import tokens as token_files
from fwpkm.data.codec import Codec, TokenArray
from fwpkm.data.text import Bytes, joined, named_documents
from fwpkm.files import checksum

NAMES = (
    "code (what is held out of Python's standard library), help (what its help() says), dataset:NAME (a Hugging Face "
    "data set, or NAME:CONFIGURATION), or a text file or folder"
)


class Text(NamedTuple):
    """A text to read."""

    name: str
    tokens: TokenArray
    bytes_per_token: float
    starts: list[int] | None  # where its documents begin, if that is known

    def first(self, tokens: int) -> Text:
        """The beginning of it."""
        return self._replace(tokens=self.tokens[:tokens])

    def about(self) -> dict[str, Any]:
        """What the figures say of it."""
        return {"name": self.name, "tokens": int(self.tokens.size), "checksum": checksum_of(self.tokens)}


def read_texts(names: list[str], column: str, codec: Codec) -> Text:
    """The texts of these names, one after the other."""
    documents = [document for name in names for document in named_documents(name, column)]
    return Text(", ".join(names), *token_files.encode(documents, codec))


def held_out(subject: Subject) -> Text:
    """What the training of a model has held out, or else ``"code"``."""
    for training in (subject.folder, subject.folder.parent.parent):
        if (training / "data" / "tokens.json").exists():
            held = token_files.load(training / "data")
            return Text(f"held out from {training}", held.held_out, held.bytes_per_token, None)
    return read_texts(["code"], "text", subject.codec)


def filler(name: str, column: str) -> Bytes:
    """The bytes of a text, to hide something in."""
    return joined(named_documents(name, column))


def checksum_of(tokens: TokenArray) -> str:
    return checksum({"tokens": torch.from_numpy(tokens.astype("int64"))})
