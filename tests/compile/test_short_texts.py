"""Texts shorter than a chunk, of one token and of whole chunks: generated code, and a bounded number of graphs."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fwpkm.compile import compile_model
from tests.compile.test_model import make, step, tokens

SMALL = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "pkm_layers": []}
# (batch, length), chunks of 8 tokens: one row and several; a short text, a chunk, chunks, chunks and a short one.
KINDS = [(batch, length) for batch in (4, 1) for length in (33, 16, 5, 8, 1)]
MORE = [(batch, length) for batch in (1, 2, 3, 6) for length in (2, 3, 7, 8, 9, 13, 24, 40)]


@pytest.mark.unpoisoned
def test_generated_code_for_texts_below_and_above_a_chunk():
    """Inductor, for sizes that vary: what it makes for several chunks and for none gives what eager gives."""
    model = make(**SMALL).train()
    eager, compiled = copy.deepcopy(model), compile_model(model, dynamic=True)
    for shape in ((3, 20), (2, 5), (4, 6)):
        loss, grads = step(compiled, model, tokens(*shape))
        want, want_grads = step(eager, eager, tokens(*shape))
        assert_close(loss, want, rtol=1e-4, atol=1e-4)
        for name, grad in grads.items():
            assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.unpoisoned
def test_the_number_of_graphs_is_bounded():
    """Once each kind of shapes has been met there are no more, whatever sizes come."""
    model, counter = make(**SMALL).train(), CompileCounterWithBackend("eager")
    compile_model(model)  # raises the limit
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for shape in (*KINDS, *MORE):
        compiled(tokens(*shape), labels=tokens(*shape))
    met = counter.frame_count
    assert met <= 20
    for batch, length in MORE:
        compiled(tokens(batch + 3, length + 32), labels=tokens(batch + 3, length + 32))
        compiled(tokens(batch, length), labels=tokens(batch, length))
    assert counter.frame_count == met
