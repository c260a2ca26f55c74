"""vLLM with and without memory layers, on the CPU: ``python -m benchmarks.serving`` writes ``results/serving.json``.

Two models of equal sizes but for the memory layers; what is timed is compared with ``fwpkm.models`` first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from benchmarks import running, tables
from benchmarks.check import WrongResultError
from fwpkm.files import write_atomically
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM

OUT = Path(__file__).parent / "results" / "serving.json"
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 64,
    "layer_types": ["sliding_attention"] * 6,
    "sliding_window": 256,
    "max_position_embeddings": 1 << 17,
    "fwpkm_n_subkeys": 128,
    "fwpkm_key_dim": 256,
    "fwpkm_value_dim": 256,
    "fwpkm_query_conv": 4,
    "fwpkm_chunk_size": 512,
    "fwpkm_key_update": "slow",
    "fwpkm_write_scale": "exact",
    "fwpkm_log_dtype": "bfloat16",
}
MEMORIES = [1, 4]
TOLERANCE = 1e-4


def make(folder: Path, memories: Sequence[int], **fields: Any) -> FwPKMForCausalLM:
    torch.manual_seed(0)
    model = FwPKMForCausalLM(FwPKMConfig(**SIZES | fields, fwpkm_layers=list(memories))).eval()
    with torch.no_grad():
        for memory in model.memories():  # or it would not show what is stored
            memory.output.weight *= 8
    model.save_pretrained(folder)
    return model


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    common: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 32,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 32,
        "max_model_len": 1 << 15,
        "kv_cache_memory_bytes": 2 << 30,
        "enable_prefix_caching": False,
    }
    llm = LLM(str(folder), enforce_eager=True, skip_tokenizer_init=True, **common | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (count, length), generator=generator).tolist()


def serve(llm: Any, texts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    """All at once: seconds until each has its first token, and tokens a second once all have."""
    from vllm import SamplingParams

    core = llm.llm_engine
    parameters = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    start, first = time.perf_counter(), {}
    for i, text in enumerate(texts):
        core.add_request(str(i), {"prompt_token_ids": text}, parameters)
    finished, done = {}, 0.0
    counts = dict.fromkeys(range(len(texts)), 0)
    at_first = 0
    while core.has_unfinished_requests():
        for output in core.step():
            name = output.request_id.split("-")[0]
            counts[int(name)] = len(output.outputs[0].token_ids)
            if name not in first:
                first[name] = time.perf_counter() - start
                if len(first) == len(texts):
                    done, at_first = time.perf_counter(), sum(counts.values())
            if output.finished:
                finished[int(name)] = output
    seconds = time.perf_counter() - done
    return {
        "first_token_seconds": statistics.median(first.values()),
        "tokens_per_second": (sum(counts.values()) - at_first) / seconds,
        "outputs": [finished[i] for i in range(len(texts))],
    }


def generated(output: Any) -> tuple[list[int], Tensor]:
    """A request's tokens, and the log probabilities that the server gave them."""
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    return ids, torch.tensor([found[token].logprob for found, token in zip(completion.logprobs, ids, strict=True)])


@torch.no_grad()
def teacher_forced(model: FwPKMForCausalLM, text: list[int], ids: list[int]) -> Tensor:
    """The model's own log probabilities of tokens after a text."""
    logits = model(torch.tensor([text + ids]), logits_to_keep=len(ids) + 1).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


@torch.no_grad()
def check(model: FwPKMForCausalLM, text: list[int], output: Any) -> dict[str, float]:
    """How far log probabilities are from the model's, and those of the model from one that stores nothing: medians.

    The first is rounding, until a token takes another slot on a near tie, as one in some thousands does with random
    weights, and what comes after it differs a little.

    Raises:
        WrongResultError: if the first is neither below ``TOLERANCE`` nor a tenth of the second.
    """
    ids, served = generated(output)

    def logprobs() -> Tensor:
        return teacher_forced(model, text, ids)

    expected, config = logprobs(), model.config.memory_config()
    for memory in model.memories():
        memory.config = dataclasses.replace(config, learning_rate=0.0)
    empty = logprobs()
    for memory in model.memories():
        memory.config = config
    error, effect = (float((x - expected).abs().median()) for x in (served, empty))
    if not error <= max(TOLERANCE, effect / 10):
        raise WrongResultError(f"log probabilities are off by {error:.2g}; what is stored changes them by {effect:.2g}")
    return {"error": error, "effect": effect}


def throughput(folder: Path, model: FwPKMForCausalLM, counts: Sequence[int], length: int, tokens: int) -> list[Any]:
    """Requests at once, each with a prompt of its own."""
    rows = []
    with engine(folder) as llm:
        serve(llm, prompts(1, length, 99), 4)  # what is made on first use
        for count in counts:
            texts = prompts(count, length, count)
            row = serve(llm, texts, tokens)
            errors = check(model, texts[-1], row.pop("outputs")[-1])
            rows.append({"requests": count, "prompt": length, "tokens": tokens} | errors | row)
    return rows


def contexts(
    folder: Path, model: FwPKMForCausalLM, lengths: Sequence[int], tokens: int, **options: Any
) -> list[dict[str, Any]]:
    """One request after a long prompt: seconds a token, and what it holds of the KV cache, at its end and at most."""
    rows = []
    with engine(folder, **options) as llm:
        serve(llm, prompts(1, 512, 99), 4)
        manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
        total = manager.block_pool.num_gpu_blocks - 1
        page = manager.kv_cache_config.kv_cache_tensors[0].size // manager.kv_cache_config.num_blocks
        for length in lengths:
            held = []
            free = manager.block_pool.get_num_free_blocks

            step = llm.llm_engine.step

            def watching(step: Any = step, held: list[int] = held, free: Any = free) -> Any:
                result = step()
                held.append(total - free())
                return result

            llm.llm_engine.step = watching
            texts = prompts(1, length, length)
            row = serve(llm, texts, tokens)
            llm.llm_engine.step = step
            errors = check(model, texts[0], row.pop("outputs")[0])
            sizes = {"bytes": held[-2] * page, "most_bytes": max(held) * page}
            rows.append({"prompt": length} | sizes | errors | row)
    return rows


def limits(folder: Path, length: int, limit: int, tokens: int) -> list[dict[str, Any]]:
    """One long request, whose log is kept, and folded, with memories of few slots: what it holds of the KV cache."""
    model, rows = make(folder, MEMORIES, fwpkm_n_subkeys=64), []
    for folded in (None, limit):
        options = {} if folded is None else {"additional_config": {"fast_weight_log_limit": folded}}
        (row,) = contexts(folder, model, [length], tokens, **options)
        kept = ("prompt", "bytes", "most_bytes", "error", "effect")
        rows.append({"limit": folded} | {name: row[name] for name in kept})
    return rows


def prefixes(folder: Path, model: FwPKMForCausalLM, shared: int, own: int, count: int) -> dict[str, Any]:
    """A system prompt that all requests have, with and without prefix caching."""
    (system,) = prompts(1, shared, 7)
    result: dict[str, Any] = {"shared": shared, "own": own, "requests": count}
    for name, caching in (("off", False), ("on", True)):
        options = {"enable_prefix_caching": caching, "prefix_cache_retention_interval": None}
        with engine(folder, **options) as llm:
            serve(llm, [system + prompts(1, own, 8)[0]], 4)
            texts = [system + text for text in prompts(count, own, 9)]
            times, hits = [], 0
            for text in texts:
                row = serve(llm, [text], 4)
                (output,) = row.pop("outputs")
                check(model, text, output)
                times.append(row["first_token_seconds"])
                hits += output.num_cached_tokens
            result[name] = {"first_token_seconds": statistics.median(times), "cached": hits / (count * (shared + own))}
    return result


def drift(folder: Path, tokens: int) -> dict[str, Any]:
    """A long answer: how far its log probabilities are from the model's, and what rounding the log changes, quarter by
    quarter (medians).
    """
    (text,) = prompts(1, 64, 10)
    result: dict[str, Any] = {"tokens": tokens}
    models = {name: make(folder / name, MEMORIES, fwpkm_log_dtype=name) for name in ("float32", "bfloat16")}
    for name, model in models.items():
        with engine(folder / name) as llm:
            (output,) = serve(llm, [text], tokens)["outputs"]
        ids, served = generated(output)
        own = teacher_forced(model, text, ids)
        result[name] = {"error": quarters(served - own)}
        if name == "bfloat16":
            result[name]["rounding"] = quarters(own - teacher_forced(models["float32"], text, ids))
    return result


def quarters(differences: Tensor) -> list[float]:
    """Their median size in each quarter."""
    return [float(part.abs().median()) for part in differences.chunk(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    torch._dynamo.config.disable = True  # vLLM would compile parts of its sampler on their first use
    quick = arguments.quick
    counts, length, tokens = ((1, 2), 64, 4) if quick else ((1, 4, 16, 32), 512, 64)
    results: dict[str, Any] = {
        "where": running.where("benchmarks.serving"),
        "sizes": SIZES | {"fwpkm_layers": MEMORIES},
        "throughput": {},
        "contexts": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name, memories in (("with", MEMORIES), ("without", [])):
            folder = Path(temporary) / name
            model = make(folder, memories)
            results["throughput"][name] = throughput(folder, model, counts, length, tokens)
            lengths = (128, 256) if quick else (1024, 4096, 16384)
            results["contexts"][name] = contexts(folder, model, lengths, tokens)
            if memories:
                results["prefixes"] = prefixes(folder, model, *((128, 32, 2) if quick else (4096, 64, 8)))
            print(json.dumps(results, indent=1), flush=True)
        results["limits"] = limits(Path(temporary) / "limits", *((5000, 512, 4) if quick else (16384, 4096, 64)))
        results["drift"] = drift(Path(temporary), 64 if quick else 10_000)
    write_atomically(arguments.out, json.dumps(results, indent=1) + "\n")
    if arguments.out == OUT:
        tables.update()


if __name__ == "__main__":
    main()
