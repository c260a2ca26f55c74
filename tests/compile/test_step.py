"""The inference step compiled in place: two graphs, whatever the pieces, and the model's numbers."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fwpkm.compile import compile_step
from tests.compile.test_export import CAPACITY, LAYOUTS, PIECES, of_model, of_step
from tests.draws import Draw
from tests.test_models import make_model


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs, of which no code is made."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


@pytest.mark.unpoisoned
@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_graphs_stream_what_the_model_does(layout, first, counter):
    model = make_model(**LAYOUTS[layout]).eval()
    step = compile_step(model, batch=2, capacity=CAPACITY)
    tokens = Draw(1).integers(32, 2, sum(PIECES))
    step(tokens[:, :first], step.start())  # whatever is compiled first
    assert_close(of_step(step, tokens), of_model(model, tokens), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2
    with torch.no_grad():
        for parameter in model.parameters():  # of which there is no copy
            parameter *= 1.1
    assert_close(of_step(step, tokens), of_model(model, tokens), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.unpoisoned
@pytest.mark.parametrize("max_length", [1, 2])
def test_short_pieces(max_length, counter):
    model = make_model(**LAYOUTS["slow"]).eval()
    step = compile_step(model, batch=2, capacity=CAPACITY, max_length=max_length)
    tokens = Draw(1).integers(32, 2, sum(PIECES))
    assert_close(of_step(step, tokens), of_model(model, tokens), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == max_length


def test_what_cannot_be_compiled_is_refused():
    model = make_model(**LAYOUTS["slow"])
    with pytest.raises(ValueError, match=r"model.training is True; expected False, of model.eval\(\)"):
        compile_step(model.train())
    with pytest.raises(ValueError, match="max_length is 10; expected a number of tokens up to 9"):
        compile_step(model.eval(), max_length=10)
