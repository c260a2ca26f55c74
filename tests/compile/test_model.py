"""A whole language model in one graph: any length and batch, eager's numbers, memories written in place."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fwpkm.compile import audit, compile_model
from fwpkm.compile.measure import peak_bytes
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM

WHOLE = [(2, 32), (3, 40), (4, 56), (5, 24)]  # chunks are 8 tokens
BROKEN = [(2, 33), (3, 42), (5, 17), (2, 63)]
MIXED = [(2, 33), (3, 42), (5, 48), (2, 63), (4, 24)]


def make(seed: int = 0, **fields: Any) -> FwPKMForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "fwpkm_layers": [0],
        "fwpkm_n_subkeys": 16,
        "fwpkm_key_dim": 8,
        "fwpkm_value_dim": 12,
        "fwpkm_topk": 3,
        "fwpkm_chunk_size": 8,
        "fwpkm_query_conv": 4,
        "pkm_layers": [1],
        "pkm_n_subkeys": 8,
        "pkm_key_dim": 8,
        "pkm_heads": 2,
        "pkm_topk": 3,
    }
    return FwPKMForCausalLM(FwPKMConfig(**(sizes | fields)))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def step(model: Any, module: FwPKMForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.zero_grad(set_to_none=True)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


KINDS = [
    {"fwpkm_scope": "sequence", "fwpkm_key_update": "slow"},
    {"fwpkm_scope": "sequence", "fwpkm_key_update": "fast", "fwpkm_detach_every": 2},
    {"fwpkm_scope": "shared", "fwpkm_key_update": "fast"},
    {"fwpkm_scope": "shared", "fwpkm_key_update": "slow"},
]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [(KINDS[0], MIXED), (KINDS[1], WHOLE), (KINDS[2], BROKEN), (KINDS[3], WHOLE)],
    ids=str,
)
def test_training_is_one_graph_for_every_shape(kind, shapes):
    """Compiled for the first shape and once more, for sizes that vary; losses, gradients and memories are eager's.

    Once more yet where lengths that are multiples of the chunk come among others.
    """
    compiled_model = make(**kind).train()
    eager_model = copy.deepcopy(compiled_model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compiled_model, fullgraph=True, backend=counter)
    graphs = []
    for shape in shapes:
        loss, grads = step(compiled, compiled_model, tokens(*shape))
        want, want_grads = step(eager_model, eager_model, tokens(*shape))
        assert_close(loss, want, rtol=1e-5, atol=1e-5)
        assert grads.keys() == want_grads.keys()
        for name, grad in grads.items():
            assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        graphs.append(counter.frame_count)
    assert graphs[-1] == (3 if shapes is MIXED else 2), f"graphs after each shape: {graphs}"
    for mine, other in zip(compiled_model.memories(), eager_model.memories(), strict=True):
        assert_close(mine.values, other.values)
        assert_close(mine.keys, other.keys)


@pytest.mark.unpoisoned
def test_inference_is_one_graph_for_every_shape():
    model = make().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(model, fullgraph=True, backend=counter), []
    with torch.no_grad():
        for shape in WHOLE:
            assert_close(compiled(input_ids=tokens(*shape)).logits, model(input_ids=tokens(*shape)).logits)
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1], f"graphs after each shape: {graphs}"


@pytest.mark.unpoisoned
def test_operator_calls_do_not_depend_on_the_length():
    """Also where keys move: the graph of sixteen chunks has the calls of the graph of four."""
    counts = []
    for length in (32, 128):
        torch.compiler.reset()
        found: list[str] = []

        def record(graph: torch.fx.GraphModule, _: Any, found: list[str] = found) -> Any:
            found += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return graph

        model = make(fwpkm_key_update="fast").train()
        torch.compile(model, fullgraph=True, backend=record)(input_ids=tokens(2, length))
        counts.append({name: found.count(name) for name in set(found) if name.startswith("fwpkm")})
    assert counts[0] == counts[1]
    assert counts[0]["fwpkm.memory_scan.default"] == 1


@pytest.mark.unpoisoned
def test_generated_code_is_eagers_and_copies_no_values():
    """Inductor, with the memory of a batch that is written between steps: in place, in the model's own buffer."""
    model = make(fwpkm_scope="shared", fwpkm_key_update="slow", fwpkm_n_subkeys=256, num_hidden_layers=1,
                 layer_types=["sliding_attention"], fwpkm_layers=[0], pkm_layers=[]).train()  # fmt: skip
    eager = copy.deepcopy(model)
    place = model.memories()[0].values.data_ptr()
    for either in (model, eager):
        step(either, either, tokens(2, 32))  # something is to be written in the compiled step
    ids = tokens(3, 40)
    compiled = compile_model(model)
    (loss, grads), code = torch._inductor.utils.run_and_get_code(step, compiled, model, ids)
    want, want_grads = step(eager, eager, ids)
    assert_close(loss, want, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    values = model.memories()[0].values
    assert values.data_ptr() == place
    assert_close(values, eager.memories()[0].values)
    text = "\n".join(code)
    assert "fwpkm.memory_write_" in text
    rows, width = values.shape
    assert f"empty_strided_cpu(({rows}, {width})" not in text
    assert peak_bytes(lambda: step(compiled, model, ids), values.device) < values.nbytes / 2


@pytest.mark.unpoisoned
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("chunks", [2, 8])
def test_backward_keeps_one_table_of_rows(chunks, checkpointed):
    """Of the rows that a scan reads its backward gets one version, not a gather for each chunk or operator."""
    model = make(num_hidden_layers=1, layer_types=["sliding_attention"], pkm_layers=[], fwpkm_topk=5).train()
    if checkpointed:
        model.checkpoint_blocks()
    compiled, sizes = torch.compile(model, fullgraph=True, backend="aot_eager"), []

    def note(x: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(x.shape))
        return x

    ids = tokens(2, 8 * chunks)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        compiled(input_ids=ids, labels=ids)
    width, rows = model.memories()[0].values.shape[1], ids.numel() * 5
    of_rows = [x for x in sizes if x[-1:] == (width,) and x[0] >= rows and x != model.memories()[0].values.shape]
    assert of_rows == ([] if checkpointed else [(rows, width)])


class Calls(TorchDispatchMode):
    """Counts calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("key_update", ["fast", "slow"])
def test_checkpointed_blocks(key_update):
    """They look for addresses once and scan twice, in a graph and without; nothing else changes."""
    model = make(fwpkm_key_update=key_update, pkm_layers=[]).train()
    eager, ids = copy.deepcopy(model), tokens(2, 33)
    model.checkpoint_blocks()
    address = "product_key_scan" if key_update == "fast" else "product_key_address"
    with Calls() as calls:
        step(model, model, ids)
    assert calls.counts[f"fwpkm::{address}"] == 1
    assert calls.counts["fwpkm::memory_scan"] == 2
    graphs = {x.phase: x.operators for x in audit(model, [{"input_ids": ids, "labels": ids}], training=True).graphs}
    assert graphs["forward"] == {f"fwpkm::{address}": 1, "fwpkm::memory_scan": 1}
    assert f"fwpkm::{address}" not in graphs["backward"]
    assert graphs["backward"]["fwpkm::memory_scan"] == 1
    loss, grads = step(torch.compile(model, fullgraph=True, backend="aot_eager"), model, ids)
    want, want_grads = step(eager, eager, ids)
    assert_close(loss, want)
    for name, grad in grads.items():
        assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-5)


def test_a_mode_that_needs_a_gpu_is_refused():
    with pytest.raises(ValueError, match="mode is reduce-overhead; expected 'default' for a model on cpu"):
        compile_model(make(), mode="reduce-overhead")
    with pytest.raises(ValueError, match="mode is 'fast'; expected 'default' or"):
        compile_model(make(), mode="fast")
