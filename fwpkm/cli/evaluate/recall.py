"""``fwpkm eval recall``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from fwpkm.cli.evaluate.run import Evaluation, Figures, Out, Seed, Settings, check_numbers
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.evaluation.associative import associative_recall
from fwpkm.progress import Progress, counter
from fwpkm.report.evaluation import draw_recall
from fwpkm.report.labels import percent


def recall(
    checkpoint: Checkpoint,
    pairs: Annotated[list[int], typer.Option(help="Pairs a sequence; may be repeated.")] = [4, 16, 64, 256, 1024],  # noqa: B006
    sequences: Annotated[int, typer.Option(help="Sequences of each number of pairs.")] = 16,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Multi-query associative recall: pairs of random tokens, then the keys in another order."""
    EVALUATION.run(checkpoint, out, pairs=pairs, sequences=sequences, seed=seed)


def _measure(subject: Subject, progress: Progress, settings: Settings) -> Figures:
    check_numbers(settings, "pairs", "sequences")
    rows = []
    for pairs in settings["pairs"]:
        done = counter(progress, f"{pairs:,} pairs", 6 * pairs * settings["sequences"])
        vocabulary = subject.codec.vocab_size
        row = associative_recall(
            subject.model, pairs, settings["sequences"], settings["seed"], vocabulary, on_tokens=done
        )
        rows.append(row)
    return {"recall": rows}


def _table(figures: Figures) -> Table:
    table = Table("Pairs", "Tokens", "Questions", "Right (bound)", "Guessing", title="Associative recall")
    for row in figures["recall"]:
        right = f"{percent(row['right'])} (≥ {percent(row['right_lower95'])})"
        table.add_row(*(f"{row[x]:,}" for x in ("pairs", "length", "questions")), right, percent(row["chance"]))
    return table


EVALUATION = Evaluation("recall", _measure, _table, draw_recall)
