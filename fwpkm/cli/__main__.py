"""``python -m fwpkm.cli``, which ``torchrun`` and ``accelerate launch`` start."""

from fwpkm.cli import app

app(prog_name="fwpkm")
