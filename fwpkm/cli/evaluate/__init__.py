"""``fwpkm eval``: one module an evaluation; each writes its figures as JSON and as a picture, and can be run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwpkm.cli.evaluate import adaptation, gates, needles, perplexity, recall
from fwpkm.cli.evaluate.run import run_again

app = typer.Typer(no_args_is_help=True, help="Measure what a model predicts, stores and recalls.")

app.command()(perplexity.perplexity)
app.command()(needles.needles)
app.command()(recall.recall)
app.command()(adaptation.adaptation)
app.command()(gates.gates)

EVALUATIONS = {x.EVALUATION.name: x.EVALUATION for x in (perplexity, needles, recall, adaptation, gates)}


@app.command()
def rerun(
    file: Annotated[Path, typer.Argument(help="JSON file that an evaluation has written.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the new figures.")] = None,
) -> None:
    """Run an evaluation again with the settings in its JSON file, and compare: ends with 1 if a figure differs.

    Times are not compared.
    """
    run_again(EVALUATIONS, file, checkpoint, out)
