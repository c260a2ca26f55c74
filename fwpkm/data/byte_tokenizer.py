"""Bytes as a tokenizer, in the form of every other: what transformers' users and servers read from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 256  # a model with so many tokens reads bytes
PAD, END = 0xFE, 0xFF  # no UTF-8 has these bytes
PAD_TEXT, END_TEXT = "<|pad|>", "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the bytes of the UTF-8 text.

    Two bytes that no text has, 254 and 255, pad and end a text; they are written ``<|pad|>`` and ``<|end|>``.
    """
    characters = _characters()
    special = {PAD: PAD_TEXT, END: END_TEXT}
    tokenizer = Tokenizer(models.BPE({special.get(byte, text): byte for byte, text in characters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_TEXT, pad_token=PAD_TEXT, clean_up_tokenization_spaces=False
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is the one that :func:`byte_tokenizer` makes."""
    return bool(tokenizer.get_vocab() == byte_tokenizer().get_vocab())


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved to ``folder``."""
    return (folder / "tokenizer_config.json").exists()


def _characters() -> dict[int, str]:
    """How byte-level tokenizers write each byte: as itself if printable, or the next from 256 on that is free."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(VOCABULARY) if byte not in set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
