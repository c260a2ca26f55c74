"""Generation by a model whose forward somebody has compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.compile.test_model import make, tokens

HOSTS = {
    "its forward": lambda model, graphs: setattr(
        model, "forward", torch.compile(model.forward, backend=graphs, dynamic=True)
    ),
    "model.compile()": lambda model, graphs: model.compile(backend=graphs),
    "its backbone": lambda model, graphs: model.model.compile(backend=graphs),
}


@pytest.mark.parametrize("host", list(HOSTS))
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generate_compiles_nothing(host, options):
    """The tokens are those of the model as it is, and no graph is made, however many tokens there are."""
    model, graphs = make().eval(), CompileCounter()
    want = model.generate(tokens(2, 12), max_new_tokens=11, do_sample=False, **options)
    HOSTS[host](model, graphs)
    assert torch.equal(model.generate(tokens(2, 12), max_new_tokens=11, do_sample=False, **options), want)
    assert graphs.frame_count == 0
    model(tokens(2, 12))
    assert graphs.frame_count == 1  # outside of generate it is as compiled as before
