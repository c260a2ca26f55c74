"""The laws of docs/design.md, section 2, through the whole language model: every layout, any mix of memory options."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fwpkm.memory import KEY_UPDATES, WRITE_SCALES
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from tests.draws import Draw, seeds
from tests.test_models import LAYOUTS, make_model

memories = st.fixed_dictionaries(
    {
        "fwpkm_key_update": st.sampled_from(KEY_UPDATES),
        "fwpkm_write_scale": st.sampled_from(WRITE_SCALES),
        "fwpkm_score": st.sampled_from(["idw", "dot"]),
        "fwpkm_heads": st.integers(1, 2),
        "fwpkm_lookahead": st.integers(0, 2),
        "fwpkm_chunk_size": st.integers(1, 12),
        "fwpkm_query_conv": st.integers(0, 4),
        "fwpkm_learning_rate": st.sampled_from([0.3, 1.0]),
    }
)
splits = st.sets(st.integers(1, 29), max_size=5)
LENGTH = 30


def draw_model(seed: int, layout: dict, memory: dict) -> FwPKMForCausalLM:
    """In float64: rounding must not send a query to another slot."""
    return make_model(seed, **layout, **memory).double()


def assert_same(have: Tensor, want: Tensor) -> None:
    assert_close(have, want, rtol=1e-4, atol=1e-4)  # norms round to float32 inside


@given(seed=seeds, cuts=splits, layout=LAYOUTS, memory=memories)
@torch.no_grad()
def test_streams(seed, cuts, layout, memory):
    """Any prefill split, down to token by token, gives the logits of one pass."""
    model = draw_model(seed, layout, memory)
    tokens = Draw(seed).integers(32, 2, LENGTH)
    cache = FwPKMCache(model.config)
    pieces = [model(x, past_key_values=cache).logits for x in tokens.tensor_split(sorted(cuts), dim=1)]
    assert_same(torch.cat(pieces, 1), model(tokens).logits)
    assert cache.get_seq_length() == LENGTH


@given(seed=seeds, layout=LAYOUTS, memory=memories)
@torch.no_grad()
def test_isolation_and_batch_permutation(seed, layout, memory):
    """What a sequence gets depends neither on what else is in the batch, nor on its place there."""
    model = draw_model(seed, layout, memory)
    tokens = Draw(seed).integers(32, 3, LENGTH)
    together = model(tokens).logits
    assert_same(model(tokens[[2, 0, 1]]).logits, together[[2, 0, 1]])
    for row in range(3):
        assert_same(model(tokens[row : row + 1]).logits, together[row : row + 1])


@given(seed=seeds, layout=LAYOUTS, memory=memories, cuts=splits, padding=st.integers(1, 29))
@torch.no_grad()
def test_left_padded_is_unpadded(seed, layout, memory, cuts, padding):
    """A row with padding on its left gives what its tokens give alone, also when its calls cut it anywhere."""
    model = draw_model(seed, layout, memory)
    tokens = Draw(seed).integers(32, 2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :padding] = 0
    cache, pieces = FwPKMCache(model.config), []
    for piece in tokens.tensor_split(sorted(cuts), dim=1):
        read = cache.get_seq_length() + piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :read], past_key_values=cache).logits)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate gives them
    explicit = model(tokens, attention_mask=mask, position_ids=positions).logits
    first, second = model(tokens[:1]).logits, model(tokens[1:, padding:]).logits
    for have in (model(tokens, attention_mask=mask).logits, explicit, torch.cat(pieces, 1)):
        assert_same(have[:1], first)
        assert_same(have[1:, padding:], second)


@given(
    seed=seeds,
    layout=LAYOUTS,
    memory=memories,
    cuts=splits,
    share=st.sampled_from([0.2, 0.6, 0.9]),
    attention=st.sampled_from(["windowed_sdpa", "sdpa", "eager"]),
)
@torch.no_grad()
def test_masked_is_removed(seed, layout, memory, cuts, share, attention):
    """Tokens masked anywhere, in long runs too, are as good as absent, for windows as for memories, in any calls."""
    model = draw_model(seed, layout, memory)
    model.set_attn_implementation(attention)
    draw = Draw(seed)
    tokens, mask = draw.integers(32, 3, LENGTH), draw.uniform(3, LENGTH) < share
    mask[1, 5:20], mask[2, 12:] = False, False
    mask[:, 0] = True
    cache, pieces = FwPKMCache(model.config), []
    for piece in tokens.tensor_split(sorted(cuts), dim=1):
        read = cache.get_seq_length() + piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :read], cache=cache).logits)
    together, one = torch.cat(pieces, 1), model(tokens, attention_mask=mask).logits
    for row in range(3):
        want = model(tokens[row : row + 1, mask[row]]).logits[0]
        assert_same(one[row, mask[row]], want)
        assert_same(together[row, mask[row]], want)


@given(seed=seeds, layout=LAYOUTS, memory=memories, cuts=splits, both=st.booleans())
@torch.no_grad()
def test_packed_is_separate(seed, layout, memory, cuts, both):
    """Positions that begin again in a row begin another sequence, which sees nothing of those before it."""
    model = draw_model(seed, layout, memory)
    tokens = Draw(seed).integers(32, 2, LENGTH)
    parts = tokens.tensor_split(sorted(cuts), dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts]).unsqueeze(0)
    if not both:  # the first row packed, the second one whole
        positions = torch.cat((positions, torch.arange(LENGTH).unsqueeze(0)))
    have = model(tokens, position_ids=positions).logits
    separate = torch.cat([model(part).logits for part in parts], 1)
    assert_same(have[:1], separate[:1])
    assert_same(have[1:], separate[1:] if both else model(tokens).logits[1:])
