"""Train a language model with a memory on your own files, and see what the memory adds.

``python examples/train_on_your_files.py FOLDER`` reads all text files below a folder; Python's email package unless one
is named. A tenth of them is held out. `fwpkm train --text FOLDER` is the same as a command, which also stops and goes
on; here are the parts that it is made of. The forty steps of this page only show that it runs; some hundreds make a
model.
"""

import sys
import tempfile
from email import __file__ as email_package
from pathlib import Path

import torch

from fwpkm.data import tokens
from fwpkm.data.codec import Codec
from fwpkm.data.text import file_documents, text_files
from fwpkm.evaluation.memory import never_written
from fwpkm.evaluation.perplexity import perplexity
from fwpkm.models import FwPKMForCausalLM
from fwpkm.models.presets import preset
from fwpkm.training.loop import train
from fwpkm.training.settings import TrainingSettings


def main(folder: Path, out: Path, steps: int = 40) -> None:
    codec = Codec()  # of bytes; Codec.load("name") for a tokenizer
    tokens.prepare(out / "data", lambda: file_documents(text_files(folder)), codec, {"text": str(folder)})
    text = tokens.load(out / "data")
    torch.manual_seed(0)
    model = FwPKMForCausalLM(preset("tiny", vocab_size=codec.vocab_size, eos_token_id=codec.end))

    def measure(what: str, subject: FwPKMForCausalLM) -> None:
        figures = perplexity(subject, text.held_out[: 1 << 14], rows=2)
        print(f"{what}: {figures['nats_per_byte']:.3f} nats a byte")

    measure("untrained         ", model)
    train(model, text, TrainingSettings(steps=steps, batch=4, length=512, warmup=steps // 8), out, codec)
    measure("trained           ", model)
    measure("without its memory", never_written(model))


if __name__ == "__main__":
    named = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(email_package).parent
    with tempfile.TemporaryDirectory() as folder:  # out/run, or wherever you want to keep it
        main(named, Path(folder))
