"""Processes of their own for tests: forked from one that has imported everything, so that they start at once."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import fwpkm.cli

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.children"])

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
    "fwpkm_layers": [0, 1],
    "fwpkm_n_subkeys": 5,
    "fwpkm_key_dim": 6,
    "fwpkm_value_dim": 8,
    "fwpkm_query_conv": 3,
    "fwpkm_topk": 2,
    "fwpkm_chunk_size": 8,
}
TIMES = ("seconds", "tokens_per_second")  # what differs between two runs of the same training


def start(target: Callable[..., Any], *args: Any) -> BaseProcess:
    """Call ``target(*args)`` in a process of its own."""
    process = _context.Process(target=_call, args=(target, args))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    """Its exit code; negative if a signal has killed it."""
    process.join(120)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def ranks(count: int, target: Callable[..., Any], *args: Any) -> None:
    """Call ``target(*args)`` in ``count`` processes that find each other as those of torchrun do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(_ranked, rank, count, port, target, args) for rank in range(count)]
    assert [finish(process) for process in processes] == [0] * count


def command(*args: str) -> None:
    """The ``fwpkm`` command."""
    fwpkm.cli.app(list(args))


def command_killed(event: int, folder: str, *args: str) -> None:
    """The ``fwpkm`` command, killed just before its ``event``-th change of files in ``folder``."""
    seen = 0

    def watch(name: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = name in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (name == "open" and given[1] != "r")
        if changes and folder in str(given[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    command(*args)


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics of a training, without times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def _call(target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        target(*args)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _ranked(rank: int, count: int, port: int, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    target(*args)
