"""What torch and accelerate take for granted of a module, each once, for every layout of the model."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from fwpkm.layers import FwPKM, ProductKeyMemory
from fwpkm.memory import MemoryConfig
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from tests.test_models import make_model

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
PKM = {"pkm_layers": [1], "pkm_n_subkeys": 4, "pkm_key_dim": 4, "pkm_value_dim": 8, "pkm_heads": 2, "pkm_topk": 2}
LAYOUTS = {
    "keys that move": {"fwpkm_key_update": "fast"},
    "slow keys": {"fwpkm_key_update": "slow", "fwpkm_query_conv": 3},
    "shared": {"fwpkm_scope": "shared", "fwpkm_key_update": "fast"},
    "shared, slow keys": {"fwpkm_scope": "shared", "fwpkm_key_update": "slow"},
    "learned values": {"fwpkm_learn_initial_values": True},
    "linear attention": LINEAR,
    "slow memory": PKM,
    "no memory": {"fwpkm_layers": []},
    "tied embeddings": {"tie_word_embeddings": True},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
SHARED = [name for name in LAYOUTS if name.startswith("shared")]
FIRST = 13  # tokens of a first call: one chunk and a part of the next


def build(layout: str, **options) -> FwPKMForCausalLM:
    return make_model(**LAYOUTS[layout] | options)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(1, 32, (2, 21), generator=torch.Generator().manual_seed(seed))


def train(model: FwPKMForCausalLM, steps: int = 2) -> list[Tensor]:
    """Losses of steps of training, in whose course pending changes are committed."""
    losses = []
    model.train()
    for step in range(steps):
        loss = model(tokens(step), labels=tokens(step)).loss
        loss.backward()
        losses.append(loss.detach())
    return losses


def start(model: FwPKMForCausalLM) -> FwPKMCache:
    """A cache of the first tokens."""
    return model(tokens()[:, :FIRST], use_cache=True).past_key_values


def go_on(model: FwPKMForCausalLM, cache: FwPKMCache) -> Tensor:
    """The loss on the rest."""
    rest = tokens()[:, FIRST:]
    return model(rest, past_key_values=cache, labels=rest).loss


def gradients(model: FwPKMForCausalLM, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad for name, x in model.named_parameters()}


# Modules are called


@layouts
def test_every_module_is_called(layout):
    """So that hooks see it; in a model with several mixers, too."""
    model, seen = build(layout), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.add(name))
    model(tokens())
    lists = {name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    assert set(dict(model.named_modules())) - lists == seen


@layouts
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_weights_may_be_elsewhere_between_calls(layout, offload, tmp_path):
    """accelerate brings a module's own tensors in before its forward, and no others."""
    model, cpu = build(layout), torch.device("cpu")
    want, continued = model(tokens()).logits, go_on(model, start(model))
    if offload == "cpu":
        cpu_offload(model, cpu, offload_buffers=True)
    else:
        disk_offload(model, str(tmp_path), cpu, offload_buffers=True)
    assert all(x.is_meta for x in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, want)
        assert torch.equal(go_on(model, start(model)), continued)


# Copies


@layouts
def test_everything_is_pickled_and_copied(layout):
    """A trained model with what it has pending, a cache, configurations: what comes out goes on as what went in."""
    model = build(layout).train()
    train(model)
    cache = start(model).detach()
    want = go_on(model, copy.deepcopy(cache))
    for move in (pickled, saved, copy.deepcopy):
        assert torch.equal(go_on(model, move(cache)), want)
    model.zero_grad()  # what a copy of a parameter has of it
    for move in (pickled, saved, copy.deepcopy):
        twin, origin = move(model), copy.deepcopy(model)
        for losses in zip(train(twin), train(origin), strict=True):
            assert torch.equal(*losses)
        assert all(map(torch.equal, twin.state_dict().values(), origin.state_dict().values()))
        assert move(model.config).to_dict() == model.config.to_dict()
        assert move(model.config.memory_config()) == model.config.memory_config()


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@layouts
def test_a_copied_cache_has_the_gradients_of_the_cache(layout):
    model = build(layout).train()
    want = gradients(model, go_on(model, start(model)))
    have = gradients(model, go_on(model, copy.deepcopy(start(model))))
    for name in want:
        assert_close(have[name], want[name])


def test_pickle_holds_the_columns_in_use_only():
    """And not what a state that went on from the same tensors has written behind them."""
    layer = FwPKM(6, n_subkeys=16, key_dim=4, value_dim=5, config=MemoryConfig(topk=2, chunk_size=4))
    with torch.no_grad():
        state = layer(torch.randn(1, 9, 6)).state
        state = layer(torch.randn(1, 1, 6), state).state
        layer(torch.full((1, 1, 6), 7.0), state)
    records = pickled(state).memory.log.records
    assert records.used == 10
    assert all(x.shape[1] == 10 for x in records.tensors)


@pytest.mark.parametrize("layout", SHARED)
def test_a_copy_saves_its_own_memory(layout):
    """What is pending in a copy is committed by saving the copy, and by nothing else."""
    model = build(layout).train()
    model(tokens())
    twin = copy.deepcopy(model)
    have, waiting = twin.state_dict(), model.memories()[0].pending
    assert waiting.writes[0].shape[0] > 0
    assert model.memories()[0].pending is waiting
    assert not torch.equal(have["model.layers.0.memory.values"], model.memories()[0].values)


def in_child(model, queue):
    queue.put(model(tokens()).logits.sum().item())


def test_a_model_goes_to_a_spawned_process():
    model, context = build("shared"), torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=in_child, args=(model, queue))
    process.start()
    process.join()
    assert queue.get() == pytest.approx(model(tokens()).logits.sum().item(), rel=1e-5)


# Devices and dtypes


@layouts
@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_model_trains(layout, cast):
    losses = train(build(layout).to(cast))
    assert_close(torch.stack(losses).float(), torch.stack(train(build(layout))), rtol=0.05, atol=0.05)


@layouts
def test_a_model_made_without_storage_trains(layout):
    with torch.device("meta"):
        model = build(layout)
    model.to_empty(device="cpu")
    model.load_state_dict(build(layout).state_dict(), assign=True)
    model.model.rotary_emb = build(layout).model.rotary_emb  # has a buffer that is not saved
    want = train(build(layout))
    assert_close(train(model), want)


@layouts
def test_a_dispatched_model_trains(layout, tmp_path):
    origin = build(layout)
    origin.save_pretrained(tmp_path)
    with init_empty_weights():
        dispatched = FwPKMForCausalLM(origin.config)
    dispatched.tie_weights()
    load_checkpoint_and_dispatch(dispatched, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    loaded = FwPKMForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    want = train(origin)
    for model in (dispatched, loaded):
        assert_close(train(model), want)


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_are_put_in_the_place_of_others_are_trained(layout, dtype):
    """With ``assign=True`` tensors come as they are, but fast weights stay at least float32."""
    model = build(layout).train()
    model(tokens())
    model.load_state_dict({name: x.to(dtype) for name, x in build(layout).state_dict().items()}, assign=True)
    memory = model.memories()[0]
    assert memory.keys.dtype == memory.values.dtype == torch.promote_types(dtype, torch.float32)
    want = train(build(layout).to(dtype))
    assert_close(train(model), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", SHARED)
def test_changes_are_committed_wherever_the_weights_are(layout):
    """Also where tensors are replaced one by one, as accelerate does; but not where there is no storage."""
    model, twin = build(layout).train(), build(layout).train()
    for one in (model, twin):
        one(tokens())
    memory = model.memories()[0]
    memory.values = memory.values.double()
    if isinstance(memory.keys, torch.nn.Parameter):
        memory.keys = torch.nn.Parameter(memory.keys.double())
    else:
        memory.keys = memory.keys.double()
    model.commit()
    twin.commit()
    assert_close(memory.values.float(), twin.memories()[0].values)
    assert_close(memory.keys.float(), twin.memories()[0].keys)
    twin(tokens())
    twin.memories()[0].values = twin.memories()[0].values.to("meta")
    twin.memories()[0].keys = torch.nn.Parameter(twin.memories()[0].keys.to("meta"))
    with pytest.raises(ValueError, match=r"weights.values.device is meta; expected a device that holds"):
        twin.commit()


@layouts
@pytest.mark.parametrize("training", [False, True])
def test_the_meta_device_knows_the_shapes(layout, training):
    """Of a forward with and without labels, mask, packed rows and cache, and of the gradients."""
    with torch.device("meta"):
        model = build(layout).train(training)
    small = build(layout).train(training)
    mask = torch.ones(2, 21)
    mask[0, :4] = 0
    packed = {} if layout in SHARED and training else {"position_ids": (torch.arange(21) % 9).expand(2, -1)}
    for options in ({}, {"labels": tokens()}, {"attention_mask": mask}, {"use_cache": True}, packed):
        on_meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in options.items()}
        have, want = model(tokens().to("meta"), **on_meta), small(tokens(), **options)
        assert have.keys() == want.keys()
        assert have.logits.is_meta
        assert have.logits.shape == want.logits.shape
        if "use_cache" in options:
            more = tokens()[:, :1]
            have = model(more.to("meta"), past_key_values=have.past_key_values).logits
            assert have.shape == small(more, past_key_values=want.past_key_values).logits.shape
    model(tokens().to("meta"), labels=tokens().to("meta")).loss.backward()
    small(tokens(), labels=tokens()).loss.backward()
    for have, want in zip(model.parameters(), small.parameters(), strict=True):
        assert (have.grad is None) == (want.grad is None)


# Where gradients are recorded


@layouts
def test_a_detached_cache_gives_the_gradients_of_truncated_backpropagation(layout):
    """Those of the rest, with what came before as numbers; learned initial values lie before."""
    model = build(layout).train()
    with torch.no_grad():
        cache = start(model)
    want = gradients(model, go_on(model, cache))
    cache = start(model)
    assert cache.detach() is cache
    held = tree_leaves([vars(layer) for layer in cache.layers])
    assert not any(x.requires_grad for x in held if isinstance(x, Tensor))
    have = gradients(model, go_on(model, cache))
    untruncated = gradients(model, go_on(model, start(model)))
    assert any(not torch.allclose(have[name], x) for name, x in untruncated.items() if have[name] is not None)
    for name in want:
        if layout == "learned values" and name.endswith("memory.values"):
            assert have[name] is None
        else:
            assert_close(have[name], want[name])


def test_a_detached_state_of_a_layer():
    """With the memory, the inputs of its convolutions are cut off, and slow keys still learn."""
    config = MemoryConfig(topk=2, chunk_size=4, key_update="slow")
    layer = FwPKM(6, n_subkeys=4, key_dim=4, value_dim=5, query_conv=3, config=config)
    first = torch.randn(1, 9, 6, requires_grad=True)
    layer(torch.randn(1, 5, 6), layer(first).state.detach()).hidden.sum().backward()
    assert first.grad is None
    assert layer.keys.grad.abs().sum() > 0


MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@layouts
@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_a_cache_goes_on_in_any_mode(layout, before, after):
    """What one mode has computed is continued and trained in another, a token and several at a time."""
    model = build(layout).train()
    results = []
    for modes in ((before, after), ("gradients", "gradients")):
        with MODES[modes[0]]():
            cache = start(model)
        with MODES[modes[1]]():
            model(tokens()[:, FIRST : FIRST + 1], past_key_values=cache)
            loss = go_on(model, cache)
        if loss.requires_grad:
            loss.backward()
        results.append(loss.detach().clone())
    assert_close(*results)
    with MODES[before]():
        model(tokens())
        model.commit()
    train(model)


@layouts
def test_a_frozen_model_trains_when_thawed(layout):
    model = build(layout).requires_grad_(False).train()
    assert not model(tokens(), labels=tokens()).loss.requires_grad
    model.requires_grad_(True)
    train(model)
    assert all(x.grad is not None for name, x in model.named_parameters() if "conv" not in name)


# What else is done to modules


@layouts
def test_projections_may_be_reparametrized(layout):
    model = build(layout)
    want = model(tokens()).logits
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
            parametrizations.weight_norm(module)
    assert_close(model(tokens()).logits, want, rtol=1e-3, atol=1e-4)
    train(model)


@layouts
def test_a_model_is_a_function_of_its_tensors(layout):
    model, other = build(layout), build(layout)
    with torch.no_grad():
        for x in other.parameters():
            x.mul_(1.1)
    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    have = functional_call(model, tensors, (tokens(),)).logits
    assert_close(have, other(tokens()).logits)
    model.train()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters):
        return functional_call(model, (parameters, buffers), (tokens(),), {"labels": tokens()}).loss

    slopes = grad(loss)(parameters)
    model.discard()
    for name, want in gradients(model, model(tokens(), labels=tokens()).loss).items():
        assert_close(slopes[name], torch.zeros_like(slopes[name]) if want is None else want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_layers_are_stacked(scope):
    """One call for several layers; what persists in each would be lost, and is refused."""
    config, hidden = MemoryConfig(topk=2, chunk_size=4, scope=scope), torch.randn(2, 9, 6)
    layers = [FwPKM(6, n_subkeys=4, key_dim=4, value_dim=5, config=config).eval() for _ in range(3)]
    base = copy.deepcopy(layers[0]).to("meta")

    def call(*tensors):
        return functional_call(base, tensors, (hidden,)).hidden

    have = vmap(call)(*stack_module_state(layers))
    assert_close(have, torch.stack([layer(hidden).hidden for layer in layers]), rtol=1e-4, atol=1e-5)
    base.train()
    if scope == "shared":
        with pytest.raises(ValueError, match="batched by vmap; expected plain tensors in the 'shared' scope"):
            vmap(call)(*stack_module_state(layers))
        base.commit()


@layouts
def test_shared_storage_trains(layout):
    model = build(layout).share_memory()
    assert all(x.is_shared() for x in model.parameters())
    assert_close(train(model), train(build(layout)))


def test_submodules_may_be_compiled_alone():
    """And layers know their width without asking what stands in the place of a projection."""
    layers = (
        FwPKM(6, n_subkeys=4, key_dim=4, value_dim=5, query_conv=3, config=MemoryConfig(topk=2, chunk_size=4)),
        ProductKeyMemory(6, n_subkeys=4, key_dim=4, value_dim=5, heads=2, topk=2),
    )
    hidden = torch.randn(2, 9, 6)
    for layer in layers:
        want = layer(hidden)
        for name, module in list(layer.named_children()):
            setattr(layer, name, torch.compile(module, backend="eager"))
        have = layer(hidden)
        assert_close(*(x.hidden if isinstance(layer, FwPKM) else x for x in (have, want)))
