"""Bytes as a tokenizer: what a server needs in the folder of a model that was trained on bytes.

``python -m fwpkm_vllm.tokenizer CHECKPOINT`` writes it there.
"""

from __future__ import annotations

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fwpkm.checks import require
from fwpkm.models import FwPKMConfig


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the bytes of the UTF-8 text."""
    # Byte-level tokenizers write byte b as a printable character: itself, or the next one from 256 on that is free.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in set(printable))
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in characters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def main(folder: str) -> None:
    """Write the tokenizer to a model's folder."""
    vocabulary = FwPKMConfig.from_pretrained(folder).vocab_size
    require(vocabulary == 256, "vocab_size", vocabulary, "256, of a model that was trained on bytes")
    byte_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
