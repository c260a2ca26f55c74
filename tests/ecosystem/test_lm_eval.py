"""lm-eval on a checkpoint as it is."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install fwpkm[ecosystem]")
from lm_eval.models.huggingface import HFLM  # noqa: E402 (after the skip)

from fwpkm.cli import app  # noqa: E402
from fwpkm.data.byte_tokenizer import END  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["def read(text):\n    return text + é\n" * 3, "The number is 12."]


@pytest.fixture
def lm(checkpoint):
    return HFLM(pretrained=str(checkpoint), device="cpu", batch_size=1, dtype="float32")


def test_rolling_likelihoods_are_the_perplexity(lm, checkpoint, tmp_path):
    """That of ``fwpkm eval perplexity``, of texts after an end token, as lm-eval begins them."""
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    for text, found in zip(TEXTS, lm.loglikelihood_rolling(asked, disable_tqdm=True), strict=True):
        path, out, length = tmp_path / "text", tmp_path / "found.json", len(text.encode())
        path.write_bytes(bytes([END]) + text.encode())
        options = ["--text", path, "--tokens", length + 1, "--rows", 1, "--out", out]
        result = CliRunner().invoke(app, ["eval", "perplexity", str(checkpoint), *map(str, options)])
        assert result.exit_code == 0, result.output
        (ours,) = json.loads(out.read_text())["figures"]["runs"]
        assert ours["tokens"] == length + 1  # of which the first is not predicted
        assert found == pytest.approx(-ours["loss"] * length, rel=1e-4)
        assert math.isfinite(found)


def test_a_task_of_local_data(lm, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"q": "two and two", "choices": [" four", " five"], "gold": 0}] * 2
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, verbosity="ERROR")["results"]["local"]
    assert found["acc,none"] in (0.0, 1.0)
