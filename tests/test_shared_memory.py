"""A memory that a batch shares and a model keeps: only the next training forward, or a commit, writes to the model."""

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fwpkm import fast_weight_memory
from fwpkm.layers import FwPKM
from fwpkm.memory import KEY_UPDATES
from fwpkm.models import FwPKMForCausalLM
from tests.test_models import make_model

every_key_update = pytest.mark.parametrize("key_update", KEY_UPDATES)


def shared_model(key_update: str = "fast", **options) -> FwPKMForCausalLM:
    options = {"fwpkm_scope": "shared", "fwpkm_key_update": key_update, "fwpkm_write_scale": "exact"} | options
    return make_model(**options).train()


def batch(seed: int) -> Tensor:
    return torch.randint(32, (3, 21), generator=torch.Generator().manual_seed(seed))


def weights(model: FwPKMForCausalLM) -> dict[str, Tensor]:
    """The fast weights, as they are, without the commit that saving makes."""
    named = ((f"{i}.{name}", getattr(m, name)) for i, m in enumerate(model.memories()) for name in ("keys", "values"))
    return {name: x.detach().clone() for name, x in named}


def assert_equal(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert all(torch.equal(have[name], want[name]) for name in want)


def nothing_is_pending(model) -> bool:
    return all(x.pending.writes[0].numel() == 0 and x.pending.keys is None for x in model.memories())


@every_key_update
def test_a_forward_writes_nothing_until_the_next_one(key_update):
    model, tokens = shared_model(key_update), batch(0)
    before = weights(model)
    model(tokens)
    assert_equal(weights(model), before)
    model(batch(1))
    after = weights(model)
    assert not torch.equal(after["0.values"], before["0.values"])
    assert torch.equal(after["0.keys"], before["0.keys"]) == (key_update == "slow")


@every_key_update
def test_what_is_committed_is_what_the_function_stored(key_update):
    """One memory for the batch, chunks of columns, the last one ended early: section 2, then written in place."""
    model, tokens = shared_model(key_update), batch(0)
    layer = model.memories()[0]
    result = layer(model.model.embed_tokens(tokens))
    assert result.state.memory.commits == 3  # 21 columns in chunks of 8
    want = result.state.memory.fold()
    place = layer.values.data_ptr()
    layer.commit()
    assert layer.values.data_ptr() == place
    assert_close(layer.values, want.values)
    assert_close(layer.keys.detach(), want.keys.detach())
    layer.commit()  # nothing is left to write
    assert_close(layer.values, want.values)


def test_a_memory_persists_from_batch_to_batch():
    """Two training forwards, one after the other, are two calls of the function, the second on what the first wrote."""
    model = shared_model("fast")
    twin = copy.deepcopy(model)
    model(batch(0))
    have = model(batch(1)).logits
    twin(batch(0))
    twin.commit()
    assert_close(twin(batch(1)).logits, have)
    fresh = shared_model("fast")
    assert not torch.allclose(fresh(batch(1)).logits, have)


def test_evaluation_reads_it_privately_and_changes_nothing():
    """Rows in evaluation have memories of their own, whatever is in the batch, and what training left waiting stays."""
    model = shared_model("fast")
    model(batch(0))
    waiting, before = model.memories()[0].pending, weights(model)
    model.eval()
    together = model(batch(1)).logits
    for row in range(3):
        assert_close(model(batch(1)[row : row + 1]).logits, together[row : row + 1], rtol=1e-4, atol=1e-5)
    model.generate(batch(1), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert model.memories()[0].pending is waiting
    assert_equal(weights(model), before)
    model.train()
    twin = shared_model("fast")
    twin(batch(0))
    assert torch.equal(model(batch(2)).logits, twin(batch(2)).logits)


@pytest.mark.parametrize("whole", [False, True])
@every_key_update
def test_checkpointing_changes_nothing(key_update, whole):
    """Blocks, or the whole model, computed once more in the backward: the same losses, gradients and fast weights."""
    results = []
    for checkpointed in (False, True):
        model = shared_model(key_update)
        if checkpointed and not whole:
            model.checkpoint_blocks()
        seen = []
        for step in range(3):
            tokens = batch(step)
            if checkpointed and whole:
                loss = checkpoint(lambda x, model=model: model(x, labels=x).loss, tokens, use_reentrant=False)
            else:
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            seen.append(loss.detach())
        model.commit()
        seen += [p.grad for p in model.parameters()]
        results.append((seen, weights(model)))
    for have, want in zip(results[1][0], results[0][0], strict=True):
        assert_close(have, want)
    assert_equal(results[1][1], results[0][1])


def test_gradient_accumulation_is_one_batch_after_the_other():
    """Each micro-batch is a training forward; its writes are there for the next, and gradients do not see that."""
    model, twin = shared_model("train_only"), shared_model("train_only")
    for step in range(3):
        model(batch(step), labels=batch(step)).loss.backward()
    gradients = []
    for step in range(3):
        twin.zero_grad()
        twin(batch(step), labels=batch(step)).loss.backward()
        twin.commit()
        gradients.append([p.grad.clone() for p in twin.parameters()])
    for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
        assert_close(parameter.grad, sum(parts), rtol=1e-4, atol=1e-6)


def test_saving_and_moving_commit_and_loading_discards(tmp_path):
    model = shared_model("fast")
    model(batch(0))
    twin, committed = copy.deepcopy(model), copy.deepcopy(model)
    committed.commit()
    want = committed.memories()[0]
    model.save_pretrained(tmp_path)
    assert nothing_is_pending(model)
    loaded = FwPKMForCausalLM.from_pretrained(tmp_path)
    assert_close(loaded.memories()[0].values, want.values)
    assert_close(loaded.memories()[0].keys, want.keys)
    twin.to(torch.float64)
    assert_close(twin.memories()[0].values, want.values.double())
    model(batch(1))
    model.load_state_dict(loaded.state_dict())
    assert nothing_is_pending(model)
    assert_close(model.memories()[0].values, want.values)


def test_discard():
    model = shared_model("fast")
    before = weights(model)
    model(batch(0))
    model.discard()
    model(batch(1))
    assert_equal(weights(model), before)


def test_a_state_that_is_passed_on_is_private():
    """With a cache the sequences' memories live there, in training too."""
    model = shared_model("fast")
    cache = model(batch(0), use_cache=True).past_key_values
    model.discard()
    model(batch(1), past_key_values=cache)
    assert nothing_is_pending(model)


def test_masked_tokens_of_a_shared_memory_write_nothing():
    layer = FwPKM(6, n_subkeys=4, key_dim=4, value_dim=5, config=shared_model("slow").memories()[0].config)
    hidden, mask = torch.randn(2, 12, 6), torch.ones(2, 12, dtype=torch.bool)
    mask[1, :7] = False
    garbage = torch.where(mask.unsqueeze(-1), hidden, 1e6)
    results = [layer(x, mask=mask) for x in (hidden, garbage)]
    assert_close(results[0].hidden[mask], results[1].hidden[mask])
    assert_close(results[0].state.memory.dense_values(), results[1].state.memory.dense_values())


def test_learned_values_are_not_shared():
    with pytest.raises(ValueError, match="learn_initial_values is True; expected False with scope 'shared'"):
        make_model(fwpkm_scope="shared", fwpkm_learn_initial_values=True)


def test_the_function_refuses_resets_of_a_shared_memory():
    layer = shared_model("slow").memories()[0]
    query, target = torch.randn(1, 4, 1, 6), torch.randn(1, 4, 8)
    start = layer(torch.randn(1, 4, 16)).state.memory.base
    with pytest.raises(ValueError, match="reset is given; expected None in the 'shared' scope"):
        fast_weight_memory(query, target, torch.rand(1, 4), start, layer.config, reset=torch.zeros(1, 4).bool())
