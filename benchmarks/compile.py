"""Measure whole models as graphs: ``python -m benchmarks.compile``; nothing is timed that has not been compared."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import language_model as lm
from benchmarks import overhead, running, tables, timing
from benchmarks.check import TOLERANCE, compare
from benchmarks.language_model import Size
from fwpkm.cli.console import console
from fwpkm.compile import compile_model
from fwpkm.compile.measure import peak_bytes
from fwpkm.models import FwPKMCache, FwPKMForCausalLM

RESULTS = Path(__file__).parent / "results" / "compile.json"
SECTIONS = ("step", "paper", "checkpoint", "start", "calls", "decode", "overhead")

KEPT = ("everything", "addresses", "nothing")

GOAL = Size()
PAPER = Size(n_subkeys=512, key_dim=512, value_dim=512)

Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run measures. The defaults are the committed run's."""

    size: Size = GOAL
    paper: Size = PAPER
    repeats: int = 9
    paper_repeats: int = 5
    lengths: tuple[int, ...] = (512, 2048)  # of the counted steps
    contexts: tuple[int, ...] = (1 << 10, 1 << 14, 1 << 17)
    piece: int = 4096  # in which contexts are read
    decode_tokens: int = 512  # a chunk, with its commit
    overhead_repeats: int = 21
    overhead_calls: int = 300


_TINY = Size(
    hidden=32, intermediate=48, blocks=2, vocabulary=64, memories=(0,), n_subkeys=16, key_dim=8, value_dim=8, chunk=16,
    batch=2, tokens=64,
)  # fmt: skip
QUICK = Settings(
    size=_TINY,
    paper=dataclasses.replace(_TINY, n_subkeys=24),
    repeats=3,
    paper_repeats=2,
    lengths=(64, 128),
    contexts=(64, 256),
    piece=64,
    decode_tokens=16,
    overhead_repeats=3,
    overhead_calls=5,
)


def main(
    only: Annotated[list[str], typer.Option(help=f"Section to measure: {', '.join(SECTIONS)}; may be repeated.")] = [],  # noqa: B006
    quick: running.Quick = False,
    threads: running.Threads = 2,
    out: running.Out = RESULTS,
) -> None:
    """Compare with eager, measure, and write a JSON file and, for the committed one, the tables of docs/compile.md."""
    running.prepare(only, SECTIONS, quick and out == RESULTS, threads)
    run(QUICK if quick else Settings(), tuple(only) or SECTIONS, out)
    results = json.loads(out.read_text())
    console.print(tables.everything("compile", results), markup=False, highlight=False, soft_wrap=True)
    if out == RESULTS:
        tables.update()


def run(settings: Settings, sections: Sequence[str], out: Path) -> None:
    """Measure sections and put them into ``out``, each as soon as it is complete.

    Raises:
        WrongResultError: if something to be measured is wrong; its section is then not written.
    """
    measures = {
        "step": lambda: step(settings.size, settings.repeats, (None, "slow", "fast")),
        "paper": lambda: step(settings.paper, settings.paper_repeats, (None, "slow")),
        "checkpoint": lambda: checkpoint(settings.size, settings.paper_repeats),
        "start": lambda: start(settings.size),
        "calls": lambda: calls(settings.size, settings.lengths),
        "decode": lambda: decode(settings),
        "overhead": lambda: overhead.measure_apart(settings.overhead_repeats, settings.overhead_calls),
    }
    running.measure_into(out, {name: measures[name] for name in SECTIONS if name in sections}, "benchmarks.compile")


def _compiled(model: FwPKMForCausalLM) -> Any:
    return compile_model(model, dynamic=False)


def step(size: Size, repeats: int, kinds: Sequence[str | None]) -> Results:
    """A training step compiled and eager, of models with memories and of one without, all interleaved."""
    torch.compiler.reset()
    errors: dict[str, dict[str, float]] = {}
    runs: dict[tuple[str | None, bool], timing.Run] = {}
    for kind in kinds:
        model = lm.make(size, kind).train()
        compiled = _compiled(model)
        name = f"compiled step, {_named(kind)}"
        ids = lm.draw(size, 0)
        errors[_named(kind)] = lm.check_step(name, compiled, model, ids, TOLERANCE)
        runs[kind, True], runs[kind, False] = (_step_run(call, model, ids) for call in (compiled, model))
    named = {f"{kind} {graph}": run for (kind, graph), run in runs.items()}
    seconds = timing.interleaved(named, repeats)
    rows = []
    for kind, graph in runs:
        found = {
            key: statistics.median(seconds[f"{other} {form}"])
            for key, other, form in (("this", kind, graph), ("without", None, graph), ("eager", kind, False))
        }
        row: Results = {"key_update": kind, "compiled": graph} | timing.summary(seconds[f"{kind} {graph}"])
        row |= {"over_without": found["this"] / found["without"], "over_eager": found["this"] / found["eager"]}
        rows.append(row)
    return {"size": dataclasses.asdict(size), "errors": errors, "rows": rows}


def _named(kind: str | None) -> str:
    return f"keys {kind}" if kind else "without memories"


def _step_run(call: Any, model: FwPKMForCausalLM, ids: Tensor) -> timing.Run:
    return lambda: lm.step(call, model, ids)


def checkpoint(size: Size, repeats: int) -> list[Results]:
    """A compiled training step that keeps all activations, addresses only, or none within blocks: time and memory."""
    torch.compiler.reset()
    runs: dict[str, timing.Run] = {}
    for kept in KEPT:
        model = lm.make(size, "slow").train()
        if kept == "addresses":
            model.checkpoint_blocks()
        elif kept == "nothing":
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        compiled = _compiled(model)
        ids = lm.draw(size, 0)
        lm.check_step(f"step that keeps {kept}", compiled, model, ids, TOLERANCE)
        runs[kept] = _step_run(compiled, model, ids)
    seconds = timing.interleaved(runs, repeats)
    everything = statistics.median(seconds["everything"])
    device = torch.device("cpu")
    return [
        {"kept": kept, "bytes": peak_bytes(run, device)}
        | timing.summary(seconds[kept])
        | {"over_everything": statistics.median(seconds[kept]) / everything}
        for kept, run in runs.items()
    ]


def start(size: Size) -> list[Results]:
    """Seconds of the first compiled step of a process, Inductor's cache empty and then filled by the process before."""
    rows = []
    for kind in ("slow", None):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                rows.append({"key_update": kind, "cache": cache} | first_step(size, kind, Path(folder)))
    return rows


def first_step(size: Size, kind: str | None, cache: Path) -> dict[str, float]:
    """In a process of its own, imports not counted; and the second step, which compiles nothing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_first_step, size, kind, cache, torch.get_num_threads()).result()


def _first_step(size: Size, kind: str | None, cache: Path, threads: int) -> dict[str, float]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch.set_num_threads(threads)
    model, ids, found = lm.make(size, kind).train(), lm.draw(size, 0), {}
    compiled = _compiled(model)
    for name in ("first", "second"):
        began = time.perf_counter()
        lm.step(compiled, model, ids)
        found[name] = time.perf_counter() - began
    return found


def calls(size: Size, lengths: Sequence[int]) -> list[Results]:
    """What one compiled training step calls, compiled anew for each length, and the share of its time in operators."""
    rows = []
    for length in lengths:
        torch.compiler.reset()
        longer = dataclasses.replace(size, tokens=length)
        model = lm.make(longer, "slow").train()
        compiled = _compiled(model)
        ids = lm.draw(longer, 0)
        lm.check_step(f"compiled step of {length} tokens", compiled, model, ids, TOLERANCE)
        rows.append({"tokens": length} | counted(lambda run=_step_run(compiled, model, ids): run()))
    return rows


def counted(run: timing.Run) -> Results:
    """Calls that the graph makes of our operators and of ATen, those that our operators make, and shares of time."""
    profiling = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiling as profile, torch.profiler.record_function("step"):
        run()
    operators: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    aten = {True: 0, False: 0}  # within one of our operators, and not

    def walk(events: Iterable[Any], ours: bool, theirs: bool) -> None:
        for event in events:
            name = event.name
            if name.startswith("fwpkm::") and not ours:  # its dispatch to a backend is an event of the same name
                operators[name] += 1
                spent[name] += event.duration_time_ns
            if name.startswith("aten::") and (ours or not theirs):
                aten[ours] += 1
            walk(event.children, ours or name.startswith("fwpkm::"), theirs or name.startswith("aten::"))

    (whole,) = (event for event in profile.profiler.kineto_results.experimental_event_tree() if event.name == "step")
    walk(whole.children, False, False)
    return {
        "operators": dict(sorted(operators.items())),
        "aten": aten[False],
        "aten_inside": aten[True],
        "seconds": whole.duration_time_ns / 1e9,
        "shares": {name: spent[name] / whole.duration_time_ns for name in sorted(operators)},
    }


@torch.no_grad()
def decode(settings: Settings) -> list[Results]:
    """Seconds a token, eager, after each context; contexts interleaved.

    The first token after a context is not timed: its logits are compared with those of one forward without a cache.
    They differ by rounding, and by what a near tie of slots somewhere in the context changes: of all that is stored,
    a tenth at most.

    Raises:
        WrongResultError: if they differ by more.
    """
    size = settings.size
    model = lm.make(size, "slow").eval()
    ids = lm.draw(size, 0, 1, settings.contexts[-1] + settings.decode_tokens + 1)
    caches, errors = {}, {}
    for context in settings.contexts:
        cache = caches[context] = FwPKMCache(model.config)
        for piece in ids[:, :context].split(settings.piece, dim=1):
            model(input_ids=piece, cache=cache, logits_to_keep=1)
        found = model(input_ids=ids[:, context : context + 1], cache=cache).logits
        whole = ids[:, : context + 1]
        expected = model(input_ids=whole, logits_to_keep=1).logits
        with lm.storing_nothing(model):
            empty = model(input_ids=whole, logits_to_keep=1).logits
        effect = float((empty - expected).abs().max() / expected.abs().max())
        limit = max(TOLERANCE, effect / 10)
        error = compare(f"decode at {context}", ("logits",), [found], [expected], limit)["logits"]
        errors[context] = {"error": error, "effect": effect}
    seconds: dict[int, list[float]] = {context: [] for context in settings.contexts}
    for i in range(settings.decode_tokens):
        for context, cache in caches.items():
            token = ids[:, context + 1 + i : context + 2 + i]
            began = time.perf_counter()
            model(input_ids=token, cache=cache)
            seconds[context].append(time.perf_counter() - began)
    first = statistics.median(seconds[settings.contexts[0]])
    return [
        {"context": context, "mean": statistics.fmean(found), "slowest": max(found)}
        | errors[context]
        | timing.summary(found)
        | {"ratio": statistics.median(found) / first}
        for context, found in seconds.items()
    ]


if __name__ == "__main__":
    typer.run(main)
