"""``fwpkm eval needles``."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from fwpkm.checks import require, require_choice
from fwpkm.cli.evaluate.run import Column, Evaluation, Figures, Out, Seed, Settings, check_numbers
from fwpkm.cli.evaluate.texts import NAMES, filler
from fwpkm.cli.subject import Checkpoint, Subject
from fwpkm.data.questions import Haystack, pairs, secret_numbers
from fwpkm.data.text import Bytes
from fwpkm.demo import Questions, documents
from fwpkm.evaluation.readings import ask_after_readings
from fwpkm.evaluation.recall import ask
from fwpkm.progress import Progress, counter
from fwpkm.report.evaluation import draw_needles
from fwpkm.report.labels import bounded, length_label, percent

# The default lengths and facts of each form.
FORMS = {
    "paper": ([1 << 12, 1 << 13, 1 << 15, 1 << 17], 5),
    "pairs": ([1 << 12, 1 << 13, 1 << 15, 1 << 17], 5),
    "demo": ([1 << 10, 1 << 12, 1 << 14], 7),
}


def needles(
    checkpoint: Checkpoint,
    form: Annotated[
        str,
        typer.Option(
            help="paper: six-digit numbers hidden in text, each asked for by itself after the text was read; pairs: "
            "lines of random keys and values, asked for in the same way; demo: numbers, all asked for in one go at the "
            "end of the text, of a byte-level model."
        ),
    ] = "paper",
    length: Annotated[
        list[int], typer.Option(help="Bytes a text; may be repeated. 4K, 8K, 32K, 128K; demo: 1K, 4K, 16K.")
    ] = [],  # noqa: B006
    texts: Annotated[int, typer.Option(help="Texts of each length.")] = 16,
    facts: Annotated[int | None, typer.Option(help="Facts asked for in each text: 5; demo: 7.")] = None,
    readings: Annotated[int, typer.Option(help="Readings of a text; it is asked about after each.")] = 1,
    text: Annotated[str, typer.Option(help=f"Text to hide them in: {NAMES}.")] = "code",
    column: Column = "text",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Ask a model for facts that stand somewhere in long texts."""
    lengths, count = FORMS.get(form, ([], None))
    EVALUATION.run(
        checkpoint,
        out,
        form=form,
        length=length or lengths,
        texts=texts,
        facts=count if facts is None else facts,
        readings=readings,
        text=text,
        column=column,
        seed=seed,
    )


def _measure(subject: Subject, progress: Progress, settings: Settings) -> Figures:
    form = settings["form"]
    require_choice("form", form, list(FORMS))
    check_numbers(settings, "length", "texts", "facts", "readings")
    hidden_in = filler(settings["text"], settings["column"]) if form != "pairs" else np.empty(0, np.uint8)
    measure = _all_at_once if form == "demo" else _after_readings
    return {
        "recall": [row for size in settings["length"] for row in measure(subject, progress, settings, hidden_in, size)]
    }


def _all_at_once(
    subject: Subject, progress: Progress, settings: Settings, hidden_in: Bytes, size: int
) -> list[Figures]:
    bytes_only = subject.codec.tokenizer is None
    require(bytes_only, "form", "'demo'", "another for {}, which has a tokenizer", subject.folder)
    require(settings["readings"] == 1, "readings", settings["readings"], "1 with form 'demo'")
    texts = settings["texts"]
    made = documents(hidden_in, Questions(size, texts, settings["facts"]), settings["seed"])
    recall = ask(subject.model, made, on_bytes=counter(progress, f"asking at {size:,} bytes", size * texts))
    summary = recall.summary()
    return [{"readings": 1, "texts": texts, "tokens_right": summary.pop("digits"), **summary}]


def _after_readings(
    subject: Subject, progress: Progress, settings: Settings, hidden_in: Bytes, size: int
) -> list[Figures]:
    rng = np.random.default_rng((settings["seed"], size))

    def made() -> Haystack:
        if settings["form"] == "pairs":
            return pairs(rng, size, settings["facts"])
        return secret_numbers(hidden_in, rng, size, settings["facts"])

    haystacks = [made() for _ in range(settings["texts"])]
    tokens = sum(subject.codec.encode(haystack.text).size for haystack in haystacks)
    done = counter(progress, f"asking at {size:,} bytes", tokens * settings["readings"])
    rows = ask_after_readings(subject.model, haystacks, settings["readings"], subject.codec, on_tokens=done)
    return [{"length": size, "tokens": tokens / len(haystacks), **row} for row in rows]


def _table(figures: Figures) -> Table:
    table = Table("Bytes", "Readings", "Questions", "Exact match (bound)", "Tokens right", "Seconds", title="Needles")
    for row in figures["recall"]:
        asked = length_label(row["length"]), str(row["readings"]), f"{row['questions']:,}"
        table.add_row(*asked, bounded(row), percent(row["tokens_right"]), f"{row['seconds']:.1f}")
    return table


EVALUATION = Evaluation("needles", _measure, _table, draw_needles)
