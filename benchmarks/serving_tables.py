"""The tables of ``results/serving.json``."""

from __future__ import annotations

from benchmarks.markdown import measured_on, table
from benchmarks.running import Results
from fwpkm.report.labels import count, decimal, length_label, percent


def everything(results: Results) -> str:
    """Requests at once, prompts of several lengths, prefix caching, a long answer, limits; and where measured."""
    both = results["throughput"]["with"], results["throughput"]["without"]
    rows = [["Requests at once", "Tokens/s", "without memories", "First token, median", "without memories"]]
    for ours, plain in zip(*both, strict=True):
        speeds = [count(x["tokens_per_second"]) for x in (ours, plain)]
        rows.append(
            [str(ours["requests"]), *speeds, *(f"{decimal(x['first_token_seconds'])} s" for x in (ours, plain))]
        )
    tables = [rows]
    both = results["contexts"]["with"], results["contexts"]["without"]
    rows = [
        ["Prompt", "Tokens/s", "without memories", "First token", "without memories", "KV cache", "without memories"]
    ]
    for ours, plain in zip(*both, strict=True):
        speeds = [decimal(x["tokens_per_second"]) for x in (ours, plain)]
        waits = [f"{decimal(x['first_token_seconds'])} s" for x in (ours, plain)]
        sizes = [f"{x['bytes'] / 1e6:.1f} MB" for x in (ours, plain)]
        rows.append([length_label(ours["prompt"]), *speeds, *waits, *sizes])
    tables.append(rows)
    prefix = results["prefixes"]
    rows = [["Prefix caching", "First token, median", "Prompt tokens found in the cache"]]
    for name in ("off", "on"):
        found = prefix[name]
        rows.append([name, f"{decimal(1e3 * found['first_token_seconds'])} ms", percent(found["cached"])])
    tables.append(rows)
    long = results["drift"]
    rows = [["Log", "Quarter 1", "2", "3", "4"]]
    names = {"float32": "float32, served against the model", "bfloat16": "bfloat16, served against the model"}
    rows += [[label, *(f"{x:.1e}" for x in long[name]["error"])] for name, label in names.items()]
    rows.append(["bfloat16 against float32", *(f"{x:.1e}" for x in long["bfloat16"]["rounding"])])
    tables.append(rows)
    rows = [["`fast_weight_log_limit`", "Prompt", "KV cache", "at most", "Difference from the model"]]
    for row in results["limits"]:
        limit = "none" if row["limit"] is None else length_label(row["limit"])
        sizes = [f"{row[name] / 1e6:.1f} MB" for name in ("bytes", "most_bytes")]
        rows.append([limit, length_label(row["prompt"]), *sizes, f"{row['error']:.1e}"])
    tables.append(rows)
    made = "\n".join(table(head, lines, "r" * len(head)) for head, *lines in tables)
    return f"{made}\n{measured_on(results)}.\n"
