"""Texts and a tokenizer."""

import pytest

from fwpkm.data.codec import Codec
from fwpkm.data.text import help_topics
from tests.tokenizer import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Codec:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, [read().decode() for read in help_topics()[:9]])
    return Codec.load(folder)
