"""What stands in a checkpoint beside configuration and weights: the way to this package, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

from fwpkm.data.byte_tokenizer import VOCABULARY, byte_tokenizer, has_tokenizer

_MODULE = "modeling_fwpkm"
_CODE = '''"""For trust_remote_code=True: the model is that of the package fwpkm, which has to be installed."""

from fwpkm.models import (
    FwPKMConfig,
    FwPKMForCausalLM,
    FwPKMForQuestionAnswering,
    FwPKMForSequenceClassification,
    FwPKMForTokenClassification,
    FwPKMModel,
)
'''
# Where transformers' Auto classes find the model in a process that never imported fwpkm.
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.FwPKMConfig",
    "AutoModel": f"{_MODULE}.FwPKMModel",
    "AutoModelForCausalLM": f"{_MODULE}.FwPKMForCausalLM",
    "AutoModelForQuestionAnswering": f"{_MODULE}.FwPKMForQuestionAnswering",
    "AutoModelForSequenceClassification": f"{_MODULE}.FwPKMForSequenceClassification",
    "AutoModelForTokenClassification": f"{_MODULE}.FwPKMForTokenClassification",
}


def write_beside(folder: Path, vocabulary: int) -> None:
    """Write what :data:`AUTO_MAP` names, and, for a model on bytes, the tokenizer, unless the folder has one."""
    (folder / f"{_MODULE}.py").write_text(_CODE)
    if vocabulary == VOCABULARY and not has_tokenizer(folder):
        byte_tokenizer().save_pretrained(folder)
