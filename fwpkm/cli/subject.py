"""The model that a command is about, with the codec of its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from fwpkm.data.codec import Codec
from fwpkm.models import FwPKMForCausalLM
from fwpkm.training import checkpoint as checkpoints

Checkpoint = Annotated[Path, typer.Argument(help="Folder of a model, or of a training: its latest checkpoint.")]


class Subject(NamedTuple):
    """A trained model, in evaluation, on a GPU if there is one."""

    model: FwPKMForCausalLM
    codec: Codec
    folder: Path  # of the model itself

    @classmethod
    def load(cls, checkpoint: Path) -> Subject:
        """The model in a folder, or the latest of a training."""
        folder = checkpoints.find(checkpoint)
        model = FwPKMForCausalLM.from_pretrained(folder).eval()
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), Codec.of_checkpoint(folder), folder)
