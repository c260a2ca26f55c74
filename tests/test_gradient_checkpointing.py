"""Activation checkpointing changes neither losses, nor gradients, nor what memories store, whoever puts it where."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fwpkm.layers import DecoderBlock, FwPKM
from fwpkm.memory import KEY_UPDATES, MemoryConfig
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from tests.draws import Draw, seeds
from tests.test_models import FULL, LAYOUTS, LINEAR, SLIDING, make_model


def wrap(model: FwPKMForCausalLM, kind: CheckpointImpl) -> None:
    """As accelerate and FSDP do it: modules around blocks."""
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda x: checkpoint_wrapper(x, checkpoint_impl=kind),
        check_fn=lambda x: isinstance(x, DecoderBlock),
    )


WAYS: dict[str, Callable[[FwPKMForCausalLM], None]] = {
    "addresses kept": lambda model: model.checkpoint_blocks(),
    "transformers": lambda model: model.gradient_checkpointing_enable(),
    "reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "wrapped": lambda model: wrap(model, CheckpointImpl.NO_REENTRANT),
    "wrapped, reentrant": lambda model: wrap(model, CheckpointImpl.REENTRANT),
    "two levels": lambda model: wrap(WAYS["addresses kept"](model) or model, CheckpointImpl.NO_REENTRANT),
}
WHOLE = {"whole model": False, "whole model, reentrant": True}


def loss_of(model: FwPKMForCausalLM, tokens: Tensor, whole: bool | None = None, **options: Any) -> Tensor:
    def run(x: Tensor, like: Tensor) -> Tensor:
        return model(x, labels=x, **options).loss

    if whole is None:
        return run(tokens, tokens)
    return checkpoint(run, tokens, torch.zeros((), requires_grad=True), use_reentrant=whole)


def placement(kind: str, tokens: Tensor) -> dict[str, Tensor]:
    batch, length = tokens.shape
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :3] = mask[1, 5] = 0
    positions = (torch.arange(length) % 7).expand(batch, -1)
    return {"plain": {}, "masked": {"attention_mask": mask}, "packed": {"position_ids": positions}}[kind]


def train(
    model: FwPKMForCausalLM, tokens: list[Tensor], schedule: str, whole: bool | None, placed: str
) -> list[Tensor]:
    """Losses, gradients and fast weights after some forwards, their backwards in turn, and a forward after them."""
    model.train()
    losses = []
    for x in tokens:
        losses.append(loss_of(model, x, whole, **placement(placed, x)))
        if schedule == "in turns":
            losses[-1].backward()
    if schedule == "sum":
        torch.stack(losses).sum().backward()
    elif schedule == "first first":
        for loss in losses:
            loss.backward()
    model.commit()
    named = [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters()]
    gradients = [p.grad for name, p in sorted(named, key=lambda x: x[0]) if p.grad is not None]
    return [*(x.detach() for x in losses), *gradients, *(x for m in model.memories() for x in (m.keys, m.values))]


models = st.fixed_dictionaries(
    {
        "fwpkm_scope": st.sampled_from(["sequence", "shared"]),
        "fwpkm_key_update": st.sampled_from(KEY_UPDATES),
        "fwpkm_gate_weight": st.sampled_from([0.0, 0.5]),
        "fwpkm_chunk_size": st.integers(1, 12),
        "fwpkm_query_conv": st.sampled_from([0, 3]),
    }
)


@given(
    seed=seeds,
    layout=LAYOUTS,
    options=models,
    way=st.sampled_from([*WAYS, *WHOLE]),
    schedule=st.sampled_from(["in turns", "sum", "first first"]),
    placed=st.sampled_from(["plain", "masked", "packed"]),
)
def test_checkpointing_changes_nothing(seed, layout, options, way, schedule, placed):
    """Of any layout: losses, gradients and fast weights, whether forwards and backwards alternate or not."""
    if placed == "packed" and options["fwpkm_scope"] == "shared":
        placed = "plain"
    if way in WHOLE and options["fwpkm_scope"] == "shared":
        schedule = "in turns"
    tokens = [Draw(seed + i).integers(32, 2, 21) for i in range(3)]
    results = []
    for checkpointed in (True, False):
        model = make_model(seed, **layout, **options).double()
        if checkpointed and way in WAYS:
            WAYS[way](model)
        results.append(train(model, tokens, schedule, WHOLE.get(way) if checkpointed else None, placed))
    assert len(results[0]) == len(results[1])
    for have, want in zip(*results, strict=True):
        assert_close(have, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", list(WHOLE))
def test_a_whole_model_repeated_too_late_is_refused(way):
    """A checkpoint around it keeps nothing of what its memory was; with blocks any order is right."""
    model = make_model(fwpkm_scope="shared")
    with pytest.raises(RuntimeError, match=r"has been committed to since.*checkpoint_blocks"):
        train(model, [Draw(i).integers(32, 2, 21) for i in range(2)], "sum", WHOLE[way], "plain")
    train(model, [Draw(i).integers(32, 2, 21) for i in range(2)], "in turns", WHOLE[way], "plain")


def test_a_layer_alone_is_repeated_once_and_in_time():
    layer = FwPKM(8, n_subkeys=5, key_dim=4, value_dim=6, config=MemoryConfig(scope="shared", chunk_size=4, topk=2))
    first, second = (torch.randn(2, 9, 8, requires_grad=True) for _ in range(2))
    checkpoint(layer, first, use_reentrant=False).hidden.sum().backward()
    stored = layer.pending
    layer.commit()
    twin = FwPKM(8, n_subkeys=5, key_dim=4, value_dim=6, config=layer.config)
    out = checkpoint(layer, second, use_reentrant=False).hidden
    assert stored.writes[0].shape[0] == layer.pending.writes[0].shape[0] > twin.pending.writes[0].shape[0]
    layer.commit()
    with pytest.raises(RuntimeError, match="has been committed to since"):
        out.sum().backward()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_forward_in_a_backward_is_no_repetition(checkpointed):
    """A hook that trains on something else stores it, as it would anywhere."""
    model, twin = (make_model(fwpkm_scope="shared").train() for _ in range(2))
    first, second = (Draw(i).integers(32, 2, 21) for i in range(2))
    if checkpointed:
        model.checkpoint_blocks()
    model(first, labels=first).loss.backward()
    model.discard()
    loss = model(first, labels=first).loss
    loss.register_hook(lambda grad: model(second) and None)
    loss.backward()
    model.commit()
    for tokens in (first, second):
        twin(tokens)
    twin.commit()
    for mine, other in zip(model.memories(), twin.memories(), strict=True):
        assert_close((mine.keys, mine.values), (other.keys, other.values))


@pytest.mark.parametrize("layout", [[SLIDING, FULL], [LINEAR, SLIDING]])
@pytest.mark.parametrize("scope", ["sequence", "shared"])
@pytest.mark.parametrize("way", ["addresses kept", "transformers", "reentrant"])
def test_a_cache_goes_on_under_checkpointing(layout, scope, way):
    """Blocks that continue a cache are not repeated: logits, states and gradients through all pieces are as ever."""
    tokens, results = Draw(0).integers(32, 2, 21), []
    for checkpointed in (True, False):
        model = make_model(layer_types=layout, fwpkm_scope=scope).double().train()
        if checkpointed:
            WAYS[way](model)
        cache = FwPKMCache(model.config)
        logits = [model(x, past_key_values=cache).logits for x in tokens.split([9, 12], 1)]
        torch.cat(logits, 1).logsumexp(-1).sum().backward()
        state = cache.memories[0].memory
        seen = (cache.tokens, state.position, state.commits, cache.get_seq_length())
        results.append((seen, [*logits, *(p.grad for p in model.parameters() if p.grad is not None)]))
    assert results[0][0] == results[1][0]
    for have, want in zip(results[0][1], results[1][1], strict=True):
        assert_close(have, want)


@pytest.mark.parametrize("way", ["wrapped", "wrapped, reentrant", "whole model"])
def test_a_cache_in_a_checkpoint_of_others_is_refused(way):
    """It would be continued twice."""
    model, tokens = make_model().train(), Draw(0).integers(32, 2, 21)
    if way in WAYS:
        WAYS[way](model)
    with pytest.raises(ValueError, match="cache is given; expected None under a checkpoint"):
        loss_of(model, tokens, WHOLE.get(way), past_key_values=FwPKMCache(model.config))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("schedule", ["in turns", "sum"])
@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_checkpoints_around_compiled_blocks(scope, schedule):
    tokens, results = [Draw(i).integers(32, 2, 21) for i in range(2)], []
    for checkpointed in (True, False):
        model = make_model(fwpkm_scope=scope, fwpkm_key_update="slow")
        if checkpointed:
            model.gradient_checkpointing_enable()
            for block in model.model.layers:
                block.compile(backend="aot_eager")
        results.append(train(model, tokens, schedule, None, "plain"))
    for have, want in zip(*results, strict=True):
        assert_close(have, want, rtol=1e-4, atol=1e-5)
