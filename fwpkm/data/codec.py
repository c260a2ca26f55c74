"""Text to tokens and back."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fwpkm.data.byte_tokenizer import END, VOCABULARY, has_tokenizer, is_byte_tokenizer

TokenArray = NDArray[np.unsignedinteger]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose last bytes are still to come


class Codec:
    """Text to tokens and back: its bytes, or the tokens of a Hugging Face tokenizer.

    Args:
        tokenizer: None for bytes, which need none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str | Path) -> Codec:
        """The tokenizer of that name or in that folder.

        Raises:
            ValueError: if there is none.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer is {str(name)!r}; expected one that loads ({error})") from error
        return cls(None if is_byte_tokenizer(tokenizer) else tokenizer)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Codec:
        """The tokenizer that was saved with a model, or bytes."""
        return cls.load(folder) if has_tokenizer(folder) else cls()

    def save(self, folder: Path) -> None:
        """Write what :meth:`of_checkpoint` reads; of bytes a model's own ``save_pretrained`` has written it."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @property
    def vocab_size(self) -> int:
        return VOCABULARY if self.tokenizer is None else len(self.tokenizer)

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest that holds every token."""
        return next(t for t in (np.uint8, np.uint16, np.uint32) if self.vocab_size - 1 <= np.iinfo(t).max)

    def encode(self, text: bytes) -> TokenArray:
        """``[T]``; without tokens that a tokenizer adds around a text."""
        if self.tokenizer is None:
            return np.frombuffer(text, dtype=np.uint8)
        tokens = self.tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False, verbose=False)
        return np.asarray(tokens, dtype=self.dtype)

    def document(self, text: bytes) -> TokenArray:
        """A text and what separates it from the next: the tokenizer's end of text, or a line end."""
        return np.append(self.encode(text), self.encode(b"\n") if self.end is None else self.dtype(self.end))

    def decoder(self) -> Decoder:
        """For text that comes token by token."""
        return _ByteDecoder() if self.tokenizer is None else _TokenDecoder(self.tokenizer)


class Decoder(Protocol):
    """Gives text as soon as it is certain."""

    def decode(self, token: int) -> str:
        """What one more token makes known; may be empty."""

    def finish(self) -> str:
        """What was still waiting for the rest of a character."""


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int) -> str:
        if token == END:
            return self.finish()
        return self._utf8.decode(bytes([min(token, END)]))  # what a larger vocabulary may give is no UTF-8 either

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _TokenDecoder:
    """A token may need the ones before it, for a space or a character: decode from there, and give what it adds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: list[int] = []
        self._waiting: list[int] = []

    def decode(self, token: int) -> str:
        self._waiting.append(token)
        added = self._added()
        if added.endswith(_UNFINISHED):
            return ""
        self._known, self._waiting = self._waiting, []
        return added

    def finish(self) -> str:
        return self._added()

    def _added(self) -> str:
        before, after = self._tokenizer.decode(self._known), self._tokenizer.decode(self._known + self._waiting)
        return str(after[len(before) :])
