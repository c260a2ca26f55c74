"""A checkpoint says all that other people's programs need: a tokenizer of bytes, an end token, where the model is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fwpkm.data.byte_tokenizer import END, END_TEXT, PAD, PAD_TEXT, byte_tokenizer
from fwpkm.data.codec import Codec
from fwpkm.demo import DemoSettings
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM, presets
from tests.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[1]
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 32}
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    FwPKMForCausalLM(FwPKMConfig(**TINY)).save_pretrained(path)
    return path


@given(st.text())
def test_tokens_are_bytes(text):
    tokens = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(tokens) == text
    if END_TEXT not in text and PAD_TEXT not in text:
        assert tokens == list(text.encode())


@given(st.binary())
def test_a_text_never_has_the_tokens_that_end_and_pad(data):
    assert not {END, PAD} & set(data.decode(errors="replace").encode())


def test_a_byte_model_has_a_tokenizer_and_an_end(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (END, PAD, 256)
    assert tokenizer("é" + END_TEXT)["input_ids"] == [0xC3, 0xA9, END]
    assert tokenizer.decode([65, END], skip_special_tokens=True) == "A"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == END
    assert Codec.of_checkpoint(folder).tokenizer is None  # bytes, as they are


def test_the_end_is_not_printed():
    decoder = Codec().decoder()
    assert "".join(map(decoder.decode, [65, END])) + decoder.finish() == "A"


def test_models_on_other_tokens_have_neither(tmp_path):
    model = FwPKMForCausalLM(FwPKMConfig(vocab_size=300, **TINY))
    model.save_pretrained(tmp_path)
    assert model.config.eos_token_id is None
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_a_tokenizer_that_is_there_stays(tmp_path):
    save_tokenizer(tmp_path, ["a few words"])
    before = (tmp_path / "tokenizer.json").read_bytes()
    FwPKMForCausalLM(FwPKMConfig(**TINY)).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert isinstance(Codec.of_checkpoint(tmp_path).tokenizer, PreTrainedTokenizerFast)


def in_a_process_of_its_own(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """``code`` with transformers alone: ``fwpkm`` is imported by nobody else."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "m")}
    command = [sys.executable, "-c", f"import sys\nfolder = {str(folder)!r}\n{code}"]
    return subprocess.run(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


AUTO = ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"]
AUTO += ["AutoModelForTokenClassification", "AutoModelForQuestionAnswering"]


def test_auto_classes_find_the_model(folder, tmp_path):
    """And what they found is saved as ever: no code is copied into the next checkpoint."""
    code = f"""
import os, transformers
assert "fwpkm" not in sys.modules
for name in {AUTO}:
    found = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert type(found).__module__.startswith("fwpkm.models."), (name, type(found))
found.save_pretrained({str(tmp_path)!r})
"""
    done = in_a_process_of_its_own(folder, code)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.py")} == {"modeling_fwpkm.py"}
    maps = [json.loads((path / "config.json").read_text())["auto_map"] for path in (folder, tmp_path)]
    assert maps[0] == maps[1]


@pytest.mark.parametrize(
    ("before", "trust", "message"),
    [
        ("", "", "trust_remote_code=True"),
        ("sys.modules['fwpkm'] = None", ", trust_remote_code=True", "fwpkm"),
    ],
)
def test_one_line_says_what_is_missing(folder, before, trust, message):
    code = f"""
import transformers
{before}
try:
    transformers.AutoModelForCausalLM.from_pretrained(folder{trust})
except (ValueError, ImportError) as error:
    assert {message!r} in str(error), error
else:
    raise AssertionError
"""
    done = in_a_process_of_its_own(folder, code)
    assert done.returncode == 0, done.stderr


def test_the_demo_and_presets_have_heads_that_vllm_serves():
    configs = [presets.preset(name) for name in presets.PRESETS] + [DemoSettings().model_config(memory=True)]
    for config in configs:
        assert config.head_dim in (32, 64, 80, 96, 112, 128)  # of both: vLLM's on CPUs and on GPUs
        assert config.head_dim * config.num_attention_heads == config.hidden_size
