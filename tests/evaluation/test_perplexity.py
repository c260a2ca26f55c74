"""Perplexity by position, with memories off and with memories that begin anew, against forwards without a cache."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fwpkm.evaluation.memory import never_written, reconfigured
from fwpkm.evaluation.perplexity import by_position, perplexity, side_by_side, token_losses
from fwpkm.evaluation.stream import stream
from tests.draws import seeds
from tests.evaluation.tiny import model, tokens

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@torch.no_grad()
def whole(net, pieces):
    """Losses ``[rows, T - 1]`` of one forward without a cache."""
    logits = net(pieces).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), pieces[:, 1:], reduction="none")


@given(seeds, st.integers(1, 3), st.integers(2, 70), st.integers(1, 40), st.sampled_from([[0, 1], [0], []]))
def test_losses_are_those_of_one_forward(seed, rows, length, call, layers):
    net = model(seed, fwpkm_layers=layers)
    pieces = torch.from_numpy(tokens(seed, rows, length))
    seen = []
    have = token_losses(net, pieces, call, seen.append)
    assert_close(have, whole(net, pieces.long()), **CLOSE)
    assert sum(seen) == rows * (length - 1)


@given(seeds, st.integers(1, 3), st.integers(2, 600))
def test_by_position(seed, rows, length):
    losses = torch.rand(rows, length - 1, generator=torch.Generator().manual_seed(seed))
    bins = by_position(losses)
    assert [b["from"] for b in bins] == [1, *(x for x in (64, 128, 256, 512) if x < length)]
    assert [b["to"] for b in bins] == [*(x for x in (64, 128, 256, 512) if x < length), length]
    for b in bins:
        part = [losses[r, p - 1].item() for r in range(rows) for p in range(b["from"], b["to"])]
        assert b["tokens"] == len(part)
        assert b["loss"] == pytest.approx(np.mean(part))
        assert b["perplexity"] == pytest.approx(math.exp(np.mean(part)))


@given(seeds, st.sampled_from(["fast", "slow"]))
def test_off_reads_base_values_only(seed, key_update):
    """As in a model whose chunks never end, so that nothing is ever read back."""
    net = model(seed, fwpkm_key_update=key_update)
    pieces = torch.from_numpy(tokens(seed, 2, 50)).long()
    off = never_written(net)
    assert_close(token_losses(off, pieces), whole(reconfigured(net, fwpkm_chunk_size=64), pieces), **CLOSE)
    assert (token_losses(net, pieces) - token_losses(off, pieces)).abs().max() > 1e-3
    assert off.model.embed_tokens.weight.data_ptr() == net.model.embed_tokens.weight.data_ptr()
    assert net.config.fwpkm_learning_rate == 1


def test_off_without_a_memory_changes_nothing():
    net = model(fwpkm_layers=[])
    pieces = torch.from_numpy(tokens(1, 2, 50))
    assert torch.equal(token_losses(net, pieces), token_losses(never_written(net), pieces))


def test_tied_weights_stay_tied():
    off = never_written(model(tie_word_embeddings=True))
    assert off.lm_head.weight is off.model.embed_tokens.weight


@given(seeds, st.integers(1, 30))
def test_a_reset_at_the_end_of_every_chunk_is_off(seed, call):
    net = model(seed)
    pieces = torch.from_numpy(tokens(seed, 2, 50))
    have = token_losses(net, pieces, call, resets=range(0, 50, 8))
    assert_close(have, token_losses(never_written(net), pieces), **CLOSE)


@given(seeds, st.integers(1, 49), st.integers(1, 30))
def test_a_reset_forgets_what_memories_hold_and_nothing_else(seed, at, call):
    """Up to it nothing changes. After it a first block's memory, which sees one token, is that of a text that begins
    there; attention still sees the tokens before.
    """
    net = model(seed, fwpkm_layers=[0], fwpkm_query_conv=0)
    pieces = torch.from_numpy(tokens(seed, 2, 50))
    usual, have = token_losses(net, pieces, call), token_losses(net, pieces, call, resets=[at])
    assert_close(have[:, :at], usual[:, :at], **CLOSE)
    assert_close(recalled(net, pieces, call, [at])[:, at:], recalled(net, pieces[:, at:], call, []), **CLOSE)
    if at < 49:
        alone = token_losses(net, pieces[:, at:], call)
        assert (have[:, at:] - alone).abs().max() > 1e-3


def recalled(net, pieces, call, resets):
    """What the first block's memory makes of its input ``[B, T, D]``."""
    memory, results = net.model.layers[0].memory, []
    hook = memory.register_forward_hook(lambda module, inputs, result: results.append(result))
    list(stream(net, pieces, call, resets=resets))
    hook.remove()
    return torch.cat([result.hidden for result in results], 1)


def test_perplexity_with_resets():
    net, text = model(2), tokens(3, 101)
    have = perplexity(net, text, rows=2, call=13, resets=[24])
    losses = token_losses(net, side_by_side(text, 2), resets=[24]).double()
    assert have["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert have["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert (have["tokens"], have["bytes"]) == (100, 100)
    assert have["loss"] != pytest.approx(perplexity(net, text, rows=2)["loss"], abs=1e-4)


def test_bad_calls():
    with pytest.raises(ValueError, match="call is 0; expected a positive integer"):
        token_losses(model(), torch.zeros(1, 5), call=0)
    with pytest.raises(ValueError, match="text is 5 tokens long; expected at least 6"):
        perplexity(model(), tokens(0, 5), rows=3)
