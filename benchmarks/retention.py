"""What memories keep of one domain after another: ``python -m benchmarks.retention``, after ``fwpkm baselines``.

Every model with a product-key memory reads facts in a text of A, then a text of B, and is asked for facts of both; and
the losses of A's text before and after B are compared (:mod:`fwpkm.evaluation.adaptation`). Two additions that need
no training are tried on two of the models: rows that no chunk writes any more decay, and gates are biased.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

import fwpkm
from benchmarks import tables
from fwpkm.baselines.comparison import SETTINGS, file_name
from fwpkm.baselines.models import baselines
from fwpkm.checks import require
from fwpkm.data.needles import SENTENCE_BYTES, Document, document
from fwpkm.data.text import Bytes, joined, named_documents
from fwpkm.evaluation.adaptation import adaptation
from fwpkm.evaluation.recall import ask, lower_bound
from fwpkm.files import write_atomically
from fwpkm.layers.host import CACHE
from fwpkm.machine import machine
from fwpkm.models import FwPKMForCausalLM, FwPKMOutput

RESULTS = Path(__file__).parent / "results" / "retention.json"
DOCUMENTS = 2
FACTS = 96  # of A
OTHER_FACTS = 96  # of B
FIRST = 1 << 14  # bytes of A, questions included
LENGTH = 1 << 16  # of everything
CHANGED = ("FwPKM fast reference", "FwPKM slow exact")  # the paper's options, and the demo's
HALF_LIVES = (32, 256)  # chunks
GATE_BIASES = (-2.0, 2.0)


def after(first: Document, rng: Generator, text: Bytes, facts: int, length: int) -> Document:
    """``first`` with a text in between its facts and its questions, and questions about that at the end.

    Args:
        first: a document without overwritten facts.
        rng: draws the text and its facts.
        text: of the other domain.
        facts: in it; as many of them are asked for as of ``first``, or all.
        length: of the whole.
    """
    questions, asked = len(first.names), min(len(first.names), facts)
    body = first.tokens.size - questions * SENTENCE_BYTES
    other = document(text, rng, length - first.tokens.size + (facts - asked) * SENTENCE_BYTES, facts)
    other_body = other.tokens.size - facts * SENTENCE_BYTES
    parts = (
        first.tokens[:body],
        other.tokens[:other_body],
        first.tokens[body:],
        other.tokens[other_body : other_body + asked * SENTENCE_BYTES],
    )
    answers = first.answers + other_body, other.answers[:asked] + first.tokens.size
    return Document(
        np.concatenate(parts),
        np.concatenate(answers),
        np.concatenate((first.needles, other.needles[:asked] + body)),
        first.names + other.names[:asked],
        first.stale + other.stale[:asked],
    )


def documents(a: Bytes, b: Bytes | None = None, facts: int = 0) -> list[Document]:
    """A, with a text of B after it if there is one; A is always the same."""
    made = [document(a, np.random.default_rng((0, i)), FIRST, FACTS) for i in range(DOCUMENTS)]
    if b is None:
        return made
    return [after(x, np.random.default_rng((1, i)), b, facts, LENGTH) for i, x in enumerate(made)]


class Decay:
    """A forward hook, for calls of one chunk each: values that the chunk did not write move towards the base's.

    Args:
        half_life: chunks until half of what was written to a row is left.
    """

    def __init__(self, half_life: float) -> None:
        self.keep = 0.5 ** (1 / half_life)

    def __call__(self, module: Any, inputs: Any, result: FwPKMOutput) -> None:
        assert result[CACHE] is not None
        memories = result[CACHE].memories
        for i, state in memories.items():
            memory = state.memory
            require(memory.open is None, "call", "no chunk", "calls of one chunk each")
            base = memory.base.values.repeat(memory.memories, 1)
            before = base if memory.own_values is None else memory.own_values
            now = memory.dense_values()
            stale = (now == before).all(1, keepdim=True)
            values = torch.where(stale, base + self.keep * (now - base), now)
            kept = dataclasses.replace(memory, own_values=values, log=None, committed=0)
            memories[i] = state._replace(memory=kept)


@contextmanager
def decaying(model: FwPKMForCausalLM, half_life: float) -> Iterator[None]:
    """``model``'s memories decay within the block."""
    hook = model.register_forward_hook(Decay(half_life))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def biased(model: FwPKMForCausalLM, bias: float) -> Iterator[None]:
    """``model``'s gates are opened (``bias > 0``) or closed within the block, before the sigmoid."""
    biases = [memory.gate.bias for memory in model.memories()]
    for x in biases:
        x.data += bias
    try:
        yield
    finally:
        for x in biases:
            x.data -= bias


def recall(model: FwPKMForCausalLM, cases: dict[str, list[Document]], call: int) -> dict[str, Any]:
    """Of each case, the share of A's facts that are kept, and of B's that are learned."""
    found = {}
    for name, made in cases.items():
        right = ask(model, made, call).right.all(-1)
        found[name] = {"kept": _share(right[:, :FACTS]), "learned": _share(right[:, FACTS:])}
    return found


def _share(right: np.ndarray[Any, Any]) -> dict[str, Any] | None:
    if not right.size:
        return None
    bound = lower_bound(int(right.sum()), right.size)
    return {"questions": right.size, "exact": float(right.mean()), "exact_lower95": bound}


ADDITIONS: dict[str, Callable[[FwPKMForCausalLM], AbstractContextManager[None]]] = {
    **{f"gate bias {bias:+g}": partial(biased, bias=bias) for bias in GATE_BIASES},
    **{f"half-life {chunks} chunks": partial(decaying, half_life=chunks) for chunks in HALF_LIVES},
}


def run(folder: Path, out: Path) -> list[dict[str, Any]]:
    """Measure the models in ``folder``, and write all rows to ``out``; those that it has are not measured again."""
    code, topics = (joined(named_documents(name)) for name in ("code", "help"))
    cases = {
        "nothing": documents(code),
        "help without facts": documents(code, topics),
        "code": documents(code, code, OTHER_FACTS),
        "help": documents(code, topics, OTHER_FACTS),
    }
    settings = {"documents": DOCUMENTS, "facts": FACTS, "first": FIRST, "other_facts": OTHER_FACTS, "length": LENGTH}
    head = {"version": fwpkm.__version__, "command": "python -m benchmarks.retention"}
    head |= {"date": date.today().isoformat(), "machine": machine(), "settings": settings}
    known = {(row["name"], row["addition"]): row for row in json.loads(out.read_text())["rows"]} if out.exists() else {}
    rows = []
    names = {b.name: folder / file_name(b) for b in baselines(SETTINGS) if (folder / file_name(b)).exists()}
    for name, addition in [(name, "") for name in names] + [
        pair for pair in product(CHANGED, ADDITIONS) if pair[0] in names
    ]:
        row = known.get((name, addition))
        if row is None:
            model = FwPKMForCausalLM.from_pretrained(names[name])
            row = {"name": name, "addition": addition}
            if addition:
                # decay looks at every chunk
                with ADDITIONS[addition](model):
                    row["recall"] = recall(model, cases, DOCUMENTS * model.config.fwpkm_chunk_size)
            else:
                row["recall"] = recall(model, cases, 1 << 15)
                row["adaptation"] = adaptation(model, code, topics, rows=2)
        rows.append(row)
        write_atomically(out, json.dumps(head | {"rows": rows}, indent=1))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("out/baselines/models"), help="what fwpkm baselines wrote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="goes on from the rows that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.models, arguments.out)
    if arguments.out == RESULTS:
        tables.update()


if __name__ == "__main__":
    main()
