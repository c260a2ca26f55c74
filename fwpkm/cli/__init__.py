"""The ``fwpkm`` command: one module a command."""

import typer
from transformers.utils import logging as transformers_logging

from fwpkm.cli import demo, doctor, evaluate, export, generate, inspect, session, train

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Fast-weight Product Key Memory."""
    transformers_logging.disable_progress_bar()  # its bars for loading weights would run through ours


app.command()(demo.demo)
app.command()(demo.baselines)
app.command()(train.train)
app.add_typer(evaluate.app, name="eval")
app.command()(generate.generate)
app.command()(session.read)
app.command()(session.ask)
app.command()(inspect.inspect)
app.command()(export.export)
app.command()(doctor.doctor)
