"""The pictures of docs/idea.md, made by the operators: ``python -m docs.pictures``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from fwpkm import FastWeights, MemoryConfig, fast_weight_memory
from fwpkm.ops import product_key_address
from fwpkm.report.plots import write_picture
from fwpkm.report.theme import Theme

IMAGES = Path(__file__).parent / "images"
N_SUB, TOPK, CHUNK = 16, 4, 8


def draw_address(_: Any, theme: Theme) -> Figure:
    """Two rankings of ``n`` sub-keys, and the ``k`` best of the ``n * n`` sums."""
    torch.manual_seed(3)
    keys, query = torch.randn(1, 1, 2, N_SUB, 4), torch.randn(1, 1, 1, 8)
    _, slots, sub_scores, sub_slots = (x[0, 0, 0] for x in product_key_address(query, keys, N_SUB))
    halves = torch.empty_like(sub_scores).scatter_(1, sub_slots, sub_scores).numpy()
    scale = LinearSegmentedColormap.from_list("score", theme.scale)
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, width_ratios=[1, 9], height_ratios=[1, 9])
    panels[0, 0].axis("off")
    sums = halves[0][:, None] + halves[1]
    panels[0, 1].imshow(halves[1][None], cmap=scale, aspect="auto")
    panels[1, 0].imshow(halves[0][:, None], cmap=scale, aspect="auto")
    panels[1, 1].imshow(sums, cmap=scale, aspect="auto")
    panels[0, 1].set_title(f"scores of the query's second half: {N_SUB} sub-keys j")
    panels[1, 0].set_ylabel(f"scores of its first half: {N_SUB} sub-keys i")
    panels[1, 1].set_xlabel(f"slot i · {N_SUB} + j: the sum of both; framed, the {TOPK} best of {N_SUB**2}")
    for half, panel in enumerate((panels[1, 0], panels[0, 1])):
        for index in sub_slots[half, :TOPK].tolist():
            place = (-0.5, index - 0.5) if half == 0 else (index - 0.5, -0.5)
            panel.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=theme.control, linewidth=2))
    for slot in slots[:TOPK].tolist():
        place = (slot % N_SUB - 0.5, slot // N_SUB - 0.5)
        panels[1, 1].add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=theme.control, linewidth=3))
    for panel in panels.flat:
        panel.grid(False)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure


def draw_chunks(_: Any, theme: Theme) -> Figure:
    """Tokens in chunks: all of a chunk read one version, and its end makes the next."""
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    panel = figure.subplots()
    chunks = 3
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 14, "linewidth": 1.8}
    for chunk in range(chunks + 1):
        left = chunk * (CHUNK + 2)
        panel.add_patch(Rectangle((left, 2.6), CHUNK, 1, facecolor=theme.scale[chunk], edgecolor=theme.rule))
        ink = theme.ink if chunk < 3 else theme.card
        panel.text(left + CHUNK / 2, 3.1, f"version {chunk}", ha="center", va="center", color=ink)
        if chunk == chunks:
            break
        for token in range(CHUNK):
            stores = token < CHUNK - 1
            face = theme.memory if stores else theme.gap
            panel.add_patch(Rectangle((left + token + 0.08, 0), 0.84, 0.84, facecolor=face, edgecolor=theme.rule))
        middle = left + CHUNK / 2
        panel.add_patch(FancyArrowPatch((middle - 1, 2.5), (middle - 1, 1), color=theme.faint, **arrow))
        panel.text(middle - 0.7, 1.7, "all read", color=theme.faint)
        start, end = (left + CHUNK - 0.5, 1), (left + CHUNK + 2.3, 2.5)
        panel.add_patch(FancyArrowPatch(start, end, color=theme.control, **arrow))
        panel.text(left + CHUNK + 1.6, 1.5, "commit", color=theme.control)
    panel.set(xlim=(-0.5, chunks * (CHUNK + 2) + CHUNK + 0.5), ylim=(-0.4, 3.9))
    panel.axis("off")
    return figure


def draw_writes(_: Any, theme: Theme) -> Figure:
    """How often chunk after chunk has read, and so written, each slot of a memory."""
    torch.manual_seed(0)
    n, length, chunk = 32, 256, 64
    start = FastWeights(torch.randn(1, 2, n, 8), torch.zeros(n * n, 4))
    config = MemoryConfig(topk=TOPK, chunk_size=chunk, key_update="slow")
    inputs = torch.randn(1, length, 1, 16), torch.randn(1, length, 4), torch.ones(1, length)
    with torch.no_grad():
        slots = fast_weight_memory(*inputs, start, config).slots[0]
    scale = LinearSegmentedColormap.from_list("reads", theme.scale)
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    panels = figure.subplots(1, length // chunk)
    for panel, tokens in zip(panels, range(chunk, length + 1, chunk), strict=True):
        reads = np.bincount(slots[:tokens].flatten(), minlength=n * n).reshape(n, n)
        panel.imshow(reads, cmap=scale, vmin=0, vmax=4)
        panel.set_title(f"{tokens} tokens: {np.count_nonzero(reads) / n**2:.0%}")
        panel.grid(False)
        panel.set(xticks=[], yticks=[])
    return figure


def draw_log(_: Any, theme: Theme) -> Figure:
    """Bytes of one sequence's memory: records, and the dense values they stand for."""
    slots, width, topk = 512**2, 512, 8
    tokens = np.logspace(8, 18, 11, base=2)
    record = topk * (8 + 4) + 2 * width + 12
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panel = figure.subplots()
    panel.plot(tokens, tokens * record / 2**20, color=theme.memory, marker="o", label=f"records, {record:,} bytes each")
    panel.axhline(slots * width * 4 / 2**20, color=theme.control, linestyle=(0, (5, 2)), label="dense values")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=10)
    panel.set_xticks(tokens[::2], [f"{int(t):,}" for t in tokens[::2]])
    panel.set(xlabel="tokens read", ylabel="MiB a layer and sequence")
    panel.legend(frameon=False)
    return figure


PICTURES = {"address": draw_address, "chunks": draw_chunks, "writes": draw_writes, "log": draw_log}


def main(folder: Path = IMAGES) -> None:
    for name, draw in PICTURES.items():
        write_picture(draw, {}, folder / f"{name}.png")


if __name__ == "__main__":
    main()
