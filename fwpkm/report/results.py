"""The results of a demo, as this room reads them: one dictionary, the same from memory or from JSON.

::

    version, command, date: str
    machine:     {cpu, cores, threads, python, torch, transformers}
    settings:    {name: number, str or list}
    parameters:  {memory, control}, how many
    training:    {memory, control}, each [{step, seconds, loss, answer_loss, digit_accuracy, gate or None}]
    recall:      [{model, length, needles, questions, exact, exact_lower95, digits, depths, seconds, bytes_per_second,
                   peak_memory_mb, load or None}]
                 depths: [{from, to, questions, exact or None}], shares of the text from its start
                 load:   {writes_per_slot, open_gate_writes_per_slot, slots_touched}
    overwritten: [{model, length, questions, exact, exact_lower95, stale}]
    perplexity:  [{model, memory: "on", "off" or "none", bytes, loss, perplexity}]
    examples:    [{length, depth, distance, question, expected, memory, control, before, needle, after, gates}]

``model`` is ``"memory"`` or ``"control"``; lengths and distances are bytes; losses are nats a byte; ``exact``,
``digits``, ``stale`` and ``slots_touched`` are shares from 0 to 1; ``gates`` has a number for every byte of ``before``,
``needle`` and ``after``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Any]
Entry = Mapping[str, Any]

MODELS = {"memory": "with memory", "control": "without memory"}


def recall_by_length(results: Results, model: str) -> dict[int, Entry]:
    """The recall entries of one model, from the shortest text to the longest."""
    entries = (entry for entry in results["recall"] if entry["model"] == model)
    return {entry["length"]: entry for entry in sorted(entries, key=lambda entry: entry["length"])}


def recall_lengths(results: Results) -> list[int]:
    """Every length at which a model was asked."""
    return sorted({entry["length"] for entry in results["recall"]})
