"""``fwpkm generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from fwpkm.checks import require
from fwpkm.cli.console import errors_in_one_line
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.data.codec import Decoder
from fwpkm.layers.host import CACHE
from fwpkm.models import FwPKMCache, FwPKMForCausalLM


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with that text.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Draw only from the likeliest tokens, that have this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Draws the tokens.")] = 0,
    commit_after_prompt: Annotated[
        bool, typer.Option(help="Let the memories read back the end of the prompt at once, not a chunk later.")
    ] = False,
) -> None:
    """Go on with a text, token by token; the memories read the text first."""
    with errors_in_one_line():
        require(
            (prompt is None) != (file is None),
            "prompt",
            "given as --prompt and --file" if file else "missing",
            "one of --prompt and --file",
        )
        require(tokens >= 1, "tokens", tokens, "a positive integer")
        require(temperature >= 0, "temperature", temperature, "a number >= 0")
        require(0 < top_p <= 1, "top_p", top_p, "a share in (0, 1]")
        text = file.read_bytes() if file else (prompt or "").encode()
        model, codec, _ = Subject.load(checkpoint)
        known = torch.from_numpy(codec.encode(text).astype("int64"))
        require(known.numel() >= 1, "prompt", "empty", "at least one token")
        torch.manual_seed(seed)
        print(text.decode(errors="replace"), end="", flush=True)
        how: dict[str, Any] = {"max_new_tokens": tokens, "commit_after_prompt": commit_after_prompt}
        how |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        _generate(model, known.unsqueeze(0).to(model.device), _Printer(codec.decoder()), how)


def _generate(model: FwPKMForCausalLM, known: Tensor, printer: _Printer, how: dict[str, Any]) -> None:
    cache = FwPKMCache(model.config)
    model.read(known[:, :-1], cache)  # generate() reads the last token
    attention_mask = torch.ones_like(known)
    model.generate(known, attention_mask=attention_mask, **{CACHE: cache}, streamer=printer, **how)


class _Printer(BaseStreamer):
    """Prints what ``generate()`` adds to the prompt as soon as it is text."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:  # comes first
            self._prompt = False
            return
        self._print(self._decoder.decode(int(value)))

    def end(self) -> None:
        self._print(self._decoder.finish() + "\n")

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
