"""The models that are compared, what is measured of them, and the command, at a tiny size."""

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from typer.testing import CliRunner

from fwpkm import cli
from fwpkm.baselines import comparison
from fwpkm.baselines.fast_weight_mlp import FastWeightMLP
from fwpkm.baselines.models import baselines, state_bytes
from fwpkm.data.text import load_split, standard_library
from fwpkm.evaluation.perplexity import perplexity
from fwpkm.memory.trail import REACH
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from fwpkm.report.baselines import baselines_table, draw_baselines
from fwpkm.report.plots import write_picture
from fwpkm.training.needles import train
from tests.draws import Draw, seeds
from tests.test_demo import TINY

SETTINGS = dataclasses.replace(TINY, training_chunk=16, chunk=32, query_conv=3)
MODELS = {baseline.name: baseline for baseline in baselines(SETTINGS)}
ONE_OF_EACH = ("full attention", "no memory", "slow PKM", "fast-weight MLP", "FwPKM fast exact")


def layer(draw: Draw, width: int, inner: int, conv: int, chunk: int) -> FastWeightMLP:
    made = FastWeightMLP(width, inner, conv, chunk).double()
    for parameter in made.parameters():
        parameter.data.copy_(draw.normal(*parameter.shape) * 0.4)
    made.log_rates.data -= 2  # or it overshoots, and rounding errors grow
    return made


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain(made: FastWeightMLP, hidden: np.ndarray) -> np.ndarray:
    """One sequence ``[T, D]``, token by token, with the derivatives of the loss written out."""
    p = {name: x.detach().numpy() for name, x in made.named_parameters()}

    def norm(x, name):
        return x / np.sqrt((x * x).mean() + np.finfo(float).eps) * p[f"{name}.weight"]

    def convolved(t, name):
        now = norm(hidden[t], f"{name}_norm")
        out = now.copy()
        if made.query_conv is not None:
            kernel = p[f"{name}_conv.weight"]
            for back in range(min(t + 1, kernel.shape[1])):
                out += kernel[:, -1 - back] * norm(hidden[t - back], f"{name}_norm")
        return p[f"{name}.weight"] @ out + p[f"{name}.bias"]

    gate_of, up, down = (p[f"weights.{i}"].copy() for i in range(3))
    rates, outputs, chunk = np.exp(p["log_rates"]), [], []
    for t in range(len(hidden)):
        query = convolved(t, "query")
        query = query / np.sqrt((query * query).mean() + np.finfo(float).eps)
        target = p["value.weight"] @ norm(hidden[t], "value_norm") + p["value.bias"]
        target = (target - target.mean()) / (target.std(ddof=1) + 1e-6)
        gate = sigmoid(convolved(t, "gate")[0])
        a, b = query @ gate_of, query @ up
        read = (a * sigmoid(a) * b) @ down
        mixed = norm(gate * read + (1 - gate) * target, "output_norm")
        outputs.append(hidden[t] + p["output.weight"] @ mixed + p["output.bias"])
        chunk.append((query, a, b, read, target, gate))
        if len(chunk) < made.chunk_size:
            continue
        steps = [np.zeros_like(x) for x in (gate_of, up, down)]
        for (q, a, b, read, _, gate), (*_, target, _) in pairwise(chunk):
            error = gate * (read - target) / (len(chunk) - 1)
            silu = a * sigmoid(a)
            inner = down @ error
            steps[0] += np.outer(q, inner * b * (sigmoid(a) + silu * (1 - sigmoid(a))))
            steps[1] += np.outer(q, inner * silu)
            steps[2] += np.outer(silu * b, error)
        for weights, rate, step in zip((gate_of, up, down), rates, steps, strict=True):
            weights -= rate * step
        chunk = []
    return np.stack(outputs)


@given(seeds, st.integers(1, 3), st.integers(1, 20), st.sampled_from([0, 1, 3]), st.integers(1, 6))
def test_fast_weight_mlp_is_its_formulas(seed, batch, length, conv, chunk):
    draw = Draw(seed)
    made = layer(draw, 6, 5, conv, chunk)
    hidden = draw.normal(batch, length, 6)
    have = made(hidden).hidden
    want = torch.from_numpy(np.stack([plain(made, row) for row in hidden.numpy()]))
    assert_close(have, want, rtol=1e-8, atol=1e-8)


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0, 3]), st.integers(1, 6))
def test_fast_weight_mlp_streams(seed, pieces, conv, chunk):
    draw = Draw(seed)
    made = layer(draw, 6, 5, conv, chunk)
    hidden = draw.normal(2, sum(pieces), 6)
    whole = made(hidden)
    state, outputs = None, []
    for piece in hidden.split(pieces, 1):
        result = made(piece, state)
        state = result.state
        outputs.append(result.hidden)
    assert_close(torch.cat(outputs, 1), whole.hidden, rtol=1e-9, atol=1e-9)
    assert state is not None
    for have, want in zip(state.weights, whole.state.weights, strict=True):
        assert_close(have, want, rtol=1e-9, atol=1e-9)


def test_gradients_go_through_the_steps_of_the_fast_weight_mlp():
    draw = Draw(1)
    made = layer(draw, 4, 3, 2, 3)
    hidden = draw.normal(1, 8, 4).requires_grad_()
    learned = (hidden, *made.weights, made.log_rates)
    assert torch.autograd.gradcheck(lambda x, *_: made(x).hidden, learned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 3, 2), "hidden_size is 0; expected a positive integer"),
        ((4, 0, 3, 2), "inner_size is 0; expected a positive integer"),
        ((4, 4, -1, 2), "query_conv is -1; expected a width, or 0 for none"),
        ((4, 4, 3, 0), "chunk_size is 0; expected a positive integer"),
    ],
)
def test_fast_weight_mlp_refuses_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        FastWeightMLP(*arguments)


@pytest.mark.parametrize("name", ["mask", "starts"])
def test_fast_weight_mlp_refuses_masks_and_packed_rows(name):
    made = FastWeightMLP(4, 4, 0, 2)
    with pytest.raises(ValueError, match=f"{name} is given; expected None"):
        made(torch.zeros(1, 3, 4), **{name: torch.ones(1, 3, dtype=torch.bool)})


def test_what_is_compared():
    assert len(MODELS) == 4 + 9 + 2
    configs = {name: baseline.build(SETTINGS).config for name, baseline in MODELS.items()}
    assert configs["full attention"].layer_types == ["full_attention"] * 2
    assert not configs["full attention"].fwpkm_layers
    assert not configs["no memory"].fwpkm_layers
    assert configs["slow PKM"].pkm_layers == [0]
    grid = {
        (c.fwpkm_key_update, c.fwpkm_write_scale)
        for c in configs.values()
        if c.fwpkm_layers and c.fwpkm_query_conv == SETTINGS.query_conv and c.fwpkm_gate_weight == 1
    }
    assert len(grid) == 9
    assert configs["FwPKM slow exact, no query_conv"].fwpkm_query_conv == 0
    assert configs["FwPKM slow exact, free gate"].fwpkm_gate_weight == 0


def test_models_differ_in_the_memory_alone():
    """What they share starts from nearly the same: same shapes, same scale; and a build is repeatable."""
    for name in ONE_OF_EACH:
        first, second = (MODELS[name].build(SETTINGS).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
    shapes = [
        {key: x.shape for key, x in MODELS[name].build(SETTINGS).named_parameters() if ".memory." not in key}
        for name in ONE_OF_EACH
        if name != "slow PKM"
    ]
    assert all(other == shapes[0] for other in shapes)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_trained_model_streams(name, text):
    """After a few steps it predicts the same in calls of any length as in one pass."""
    train_text, held_out = load_split(list(text.iterdir()))
    model = MODELS[name].build(SETTINGS)
    losses = [record["loss"] for record in train(model, train_text, SETTINGS.training)]
    assert all(map(math.isfinite, losses))
    served = MODELS[name].for_sequences(model, SETTINGS).eval()
    have = perplexity(served, held_out[:300], rows=2, call=37)["loss"]
    tokens = torch.from_numpy(held_out[:300].copy()).view(2, 150).long()
    with torch.no_grad():
        logits = served(tokens).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert have == pytest.approx(want, rel=1e-4)


def read(name: str, length: int, rows: int = 2) -> FwPKMCache:
    model = MODELS[name].for_sequences(MODELS[name].build(SETTINGS), SETTINGS).eval()
    cache = FwPKMCache(model.config)
    model.read(Draw(0).integers(256, rows, length), cache)
    return cache


def test_state_bytes_of_attention():
    width, blocks, number = SETTINGS.width, 2, 4
    assert state_bytes(read("full attention", 150)) == 2 * blocks * 2 * 150 * width * number
    for name in ("no memory", "slow PKM"):
        assert state_bytes(read(name, 150)) == 2 * blocks * 2 * min(150, 63 + REACH) * width * number


def test_state_bytes_of_fast_weights():
    """In all: window, fast weights, what the open chunk needs, and the convolutions' last inputs."""
    width, number = SETTINGS.width, 4
    window = 2 * 2 * 150 * width * number
    whole = 2 * 2 * (63 + REACH) * width * number
    inputs = (SETTINGS.query_conv - 1) * width * number
    inner = 8 * width // 3
    open_tokens = 150 % SETTINGS.training_chunk
    mlp = 3 * width * inner * number + open_tokens * (2 * width + 1) * number + inputs
    assert state_bytes(read("fast-weight MLP", 150)) == 2 * (window + mlp)

    def beside_values(name: str, length: int) -> int:
        """After whole chunks, and so long that the log has become values."""
        cache = read(name, length)
        memory = cache.memories[0].memory
        assert memory.own_values is not None
        assert memory.log is None
        kept = cache.memories[0].inputs.shape[1] * width * number
        return state_bytes(cache) - 2 * (whole + kept + SETTINGS.n_subkeys**2 * width * number)

    assert beside_values("FwPKM slow exact", 320) == 0
    assert beside_values("FwPKM fast exact", 320) == 2 * 2 * SETTINGS.n_subkeys * width // 2 * number  # own keys


def run(out, text, names, settings=SETTINGS):
    seen = []
    wanted = [MODELS[name] for name in names]
    progress = lambda what, done, total: seen.append((done, total))  # noqa: E731
    return comparison.run(out, settings, text, "fwpkm baselines", 1, progress, wanted), seen


def test_comparison(tmp_path, text):
    """From end to end in a process of its own; a row that is there is not computed again."""
    names = ["no memory", "FwPKM slow exact"]
    first = tmp_path / "rows" / "no-memory.json"
    comparison._run_one(tmp_path, first, MODELS[names[0]], SETTINGS, text)
    known = json.loads(first.read_text())
    known["row"]["parameters"] = 7
    first.write_text(json.dumps(known))
    results, seen = run(tmp_path, text, names)
    assert seen == [(1, 2), (2, 2)]
    assert [row["name"] for row in results["rows"]] == names
    assert results["rows"][0]["parameters"] == 7
    assert json.loads((tmp_path / "baselines.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "baselines.png").stat().st_size > 10_000
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["fwpkm-slow-exact"]
    for row in results["rows"]:
        assert list(row["recall"]) == ["512", "1024"]
        assert row["recall"]["1024"]["questions"] == 8
        assert row["text"]["length"] == 4 * 256
        assert row["training"]["tokens_per_cpu_second"] > 0

    _, held_out = load_split(list(text.iterdir()))
    model = FwPKMForCausalLM.from_pretrained(tmp_path / "models" / "fwpkm-slow-exact")
    again = comparison.measure(model, held_out, SETTINGS)
    assert again["text"]["nats_per_byte"] == pytest.approx(results["rows"][1]["text"]["nats_per_byte"], rel=1e-5)
    assert again["state"] == results["rows"][1]["state"]

    with pytest.raises(ValueError, match=r"out is .*; expected a new folder: this one holds rows of other settings"):
        run(tmp_path, text, names, dataclasses.replace(SETTINGS, chunk=64))


def test_speed_is_that_of_the_median_step():
    training = dataclasses.replace(SETTINGS.training, batch=4, length=100)
    times = [7.0, 9.0, 10.0, 11.0, 21.0, 22.0]
    history = [{"digit_accuracy": share} for share in (0.1, 0.2, 0.3, 0.4, 0.15)]
    figures = comparison.training_figures(history, times, training)
    assert figures == {"tokens_per_cpu_second": 400.0, "cpu_seconds": 15.0, "digit_accuracy": 0.15}


def made_up(name: str, share: float) -> dict:
    recall = {"exact": share, "exact_lower95": share / 2, "digits": share, "questions": 256}
    return {
        "name": name,
        "parameters": 1234567,
        "training": {"tokens_per_cpu_second": 4321.4, "cpu_seconds": 1.0, "digit_accuracy": 0.5},
        "text": {"length": 4096, "nats_per_byte": 1.23456},
        "recall": {"1024": recall, "131072": recall},
        "state": {"length": 131072, "bytes": 96768},
    }


def test_table():
    rows = [made_up("no memory", 0.0), made_up("FwPKM slow exact", 0.5)]
    lines = baselines_table(rows).splitlines()
    assert lines[0] == (
        "| Model | Nats a byte at 4K | Recall at 1K | Recall at 128K "
        "| Training bytes/CPU s | Parameters | State at 128K, KB |"
    )
    assert lines[3] == ("| FwPKM slow exact | 1.235 | 50.0% (≥ 25.0%) | 50.0% (≥ 25.0%) | 4,321 | 1,234,567 | 97 |")


def test_picture_shows_every_model(tmp_path):
    one, two = (tmp_path / name for name in ("one.png", "two.png"))
    write_picture(draw_baselines, {"rows": [made_up("no memory", 0.1)]}, one)
    write_picture(draw_baselines, {"rows": [made_up("no memory", 0.1), made_up("FwPKM slow exact", 0.9)]}, two)
    heights = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (one, two)]
    assert heights[1] > heights[0]


def test_command(tmp_path, text, monkeypatch):
    """It passes on what it was given; bad input is one line."""
    given = []

    def remember(out, settings, path, command, workers, progress):
        given.append((out, settings.training.steps, path, workers))
        return {"rows": [made_up("no memory", 0.5)]}

    monkeypatch.setattr(comparison, "run", remember)
    options = ["--out", str(tmp_path), "--text", str(text), "--steps", "3", "--workers", "5"]
    result = CliRunner().invoke(cli.app, ["baselines", *options])
    assert result.exit_code == 0, result.output
    assert given == [(tmp_path, 3, text, 5)]
    assert "baselines.png" in result.output.replace("\n", "")


def test_command_says_what_is_wrong_in_one_line(tmp_path):
    result = CliRunner().invoke(cli.app, ["baselines", "--out", str(tmp_path), "--text", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert result.stderr.startswith("fwpkm: ")
    assert result.stderr.count("\n") == 1


def test_the_default_text_is_long_enough():
    _, held_out = load_split(standard_library())
    assert held_out.size > comparison.SETTINGS.perplexity_bytes
