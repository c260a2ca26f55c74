"""The report: pictures, tables and the page, from made-up results."""

from __future__ import annotations

import random
from typing import Any

LENGTHS = [2**power for power in range(10, 21)]
FILLER = "def parse(line):\n    return [int(x) for x in line.split(\",\") if x]  # café\n"


def made_up_results(seed: int = 0, variants: bool = True) -> dict[str, Any]:
    """Results of no demo, in the schema of one."""
    rng = random.Random(seed)

    def share() -> float:
        return rng.choice([0.0, 1.0, rng.random(), rng.random()])

    def recall(model: str, length: int) -> dict[str, Any]:
        far = (length.bit_length() - 11) / 10
        exact = (1 - 0.35 * far**3 * rng.random()) if model == "memory" else max(0.0, 0.08 * rng.random() - 0.06)
        depths = []
        for i in range(8):
            questions = rng.choice([0, 4, 9, 12])
            hits = round(questions * min(1.0, max(0.0, rng.gauss(exact, 0.05 * (exact > 0)))))
            depths.append(
                {"from": i / 8, "to": (i + 1) / 8, "questions": questions, "exact": hits / questions if questions else None}
            )
        load = {
            "writes_per_slot": length / 128,
            "open_gate_writes_per_slot": length / 128 * rng.random() / 9,
            "slots_touched": min(1.0, length / 8192 * 0.97),
        }
        return {
            "model": model,
            "length": length,
            "questions": 64,
            "exact": exact,
            "exact_lower95": max(0.0, exact - 0.06),
            "digits": exact if model == "memory" else 0.1 + 0.05 * rng.random(),
            "depths": depths,
            "seconds": length / 20000,
            "bytes_per_second": 20000 * rng.random(),
            "peak_memory_mb": 300 + 2000 * rng.random(),
            "load": load if model == "memory" else None,
        }

    def training(model: str) -> list[dict[str, Any]]:
        return [
            {
                "step": step,
                "seconds": step / 4,
                "loss": 1.3 + 4 * 0.99**step + 0.05 * rng.random(),
                "answer_loss": 2.3,
                "digit_accuracy": 0.1 + (0.88 / (1 + 2.7 ** (-(step - 250) / 40)) if model == "memory" else 0)
                + 0.01 * rng.random(),
                "gate": 0.5 - 0.3 * step / 600 if model == "memory" else None,
            }
            for step in range(0, 601, 10)
        ]

    def example(right: bool) -> dict[str, Any]:
        name, number = "".join(rng.choices("abcdef0123", k=4)), str(rng.randrange(100000, 1000000))
        length = rng.choice(LENGTHS)
        needle = f"The secret number for ID-{name} is {number}.\n"
        gates = [0.1 * rng.random() for _ in FILLER.encode()]
        inside = [rng.random() ** (0.2 if 33 < i < 42 or 20 < i < 30 else 2) for i in range(len(needle))]
        return {
            "length": length,
            "depth": rng.random(),
            "distance": rng.randrange(length),
            "question": needle[: needle.index(number) - 1],
            "expected": number,
            "memory": number if right else "000000",
            "control": str(rng.randrange(100000, 1000000)),
            "before": FILLER,
            "needle": needle,
            "after": FILLER,
            "gates": gates + inside + gates,
        }

    results: dict[str, Any] = {
        "version": "0.1.0",
        "command": "fwpkm demo",
        "date": "2026-11-21",
        "machine": {"cpu": "A processor of 2 GHz", "cores": 4, "threads": 2, "python": "3.11.7", "torch": "2.11.0"}
        | {"transformers": "5.17.0"},
        "settings": {
            "hidden_size": 128, "layers": 4, "layer_types": ["sliding_attention"] * 2, "sliding_window": 64, "n_subkeys": 32,
            "slots": 1024, "topk": 8, "chunk_size": 512, "key_update": "train_only", "write_scale": "exact", "query_conv": 16,
            "learning_rate": 0.002, "batch_size": 16, "seed": 0, "steps": 600,
        },
        "parameters": {"memory": 1234567, "control": 1100000},
        "training": {model: training(model) for model in ("memory", "control")},
        "recall": [recall(model, length) for model in ("memory", "control") for length in LENGTHS],
        "overwritten": [
            {"model": model, "length": length, "questions": 32, "exact": share(), "exact_lower95": 0.0, "stale": share()}
            for model in ("memory", "control")
            for length in (2**10, 2**14)
        ],
        "perplexity": [
            {"model": model, "memory": memory, "bytes": 65536, "loss": 1 + rng.random(), "perplexity": 3 + rng.random()}
            for model, memory in (("memory", "on"), ("memory", "off"), ("control", "none"))
        ],
        "examples": [example(right) for right in (True, True, False)],
    }
    if variants:
        shares = [{str(length): share() for length in (2**10, 2**14, 2**17)} for _ in range(24)]
        results["variants"] = {
            "key_update": [
                {"key_update": update, "write_scale": scale, "recall": shares.pop(), "digits": shares.pop()}
                for update in ("fast", "train_only", "slow")
                for scale in ("reference", "paper", "exact")
            ],
            "query_conv": [
                {"query_conv": width, "recall": shares.pop(), "digits": shares.pop()} for width in (0, 4, 16)
            ],
        }
    return results
