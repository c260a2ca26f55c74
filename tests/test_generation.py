"""transformers' ``generate`` and cache over a model with memories: the same as computing everything anew."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from fwpkm.layers.host import CACHE
from fwpkm.memory import KEY_UPDATES
from fwpkm.models import FwPKMCache, FwPKMForCausalLM
from tests.draws import Draw, seeds
from tests.test_models import LAYOUTS, make_model

pytestmark = pytest.mark.numerical

PAD = 0
modes = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def prompts(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Left-padded tokens and their mask."""
    draw, longest = Draw(seed), max(lengths)
    tokens, mask = torch.full((len(lengths), longest), PAD), torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, longest - length :] = draw.integers(31, length) + 1
        mask[row, longest - length :] = 1
    return tokens, mask


def generate(model: FwPKMForCausalLM, tokens: Tensor, mask: Tensor | None = None, new: int = 14, **options) -> Tensor:
    torch.manual_seed(0)
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=PAD, **options
    )


@pytest.mark.parametrize("mode", modes)
@pytest.mark.parametrize("key_update", KEY_UPDATES)
@torch.no_grad()
def test_cached_equals_uncached(mode, key_update):
    """Token for token, across chunk boundaries, for left-padded prompts of different length."""
    model = make_model(fwpkm_key_update=key_update, fwpkm_write_scale="exact")
    tokens, mask = prompts(1, [11, 4, 9])
    have = generate(model, tokens, mask, **modes[mode])
    assert torch.equal(have, generate(model, tokens, mask, use_cache=False, **modes[mode]))
    assert have.shape == (6 if mode == "beams" else 3, 25)


@given(seed=seeds, lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3), layout=LAYOUTS)
@torch.no_grad()
def test_a_padded_batch_equals_each_prompt_alone(seed, lengths, layout):
    model = make_model(seed, **layout)
    tokens, mask = prompts(seed, lengths)
    together = generate(model, tokens, mask, do_sample=False)
    for row, length in enumerate(lengths):
        alone = generate(model, tokens[row : row + 1, -length:], do_sample=False)
        assert torch.equal(together[row, tokens.shape[1] :], alone[0, length:])


@given(seed=seeds, beams=st.integers(2, 4), key_update=st.sampled_from(KEY_UPDATES))
@torch.no_grad()
def test_each_beam_equals_recomputing_it(seed, beams, key_update):
    """Scores of the beams that came back, whose memories were copied from beam to beam, from one plain forward."""
    model = make_model(seed, fwpkm_key_update=key_update)
    tokens, mask = prompts(seed, [9, 6])
    torch.manual_seed(0)
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=12,
        min_new_tokens=12,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=PAD,
        output_scores=True,
        return_dict_in_generate=True,
    )
    full = torch.cat((mask.repeat_interleave(beams, 0), torch.ones(2 * beams, 12, dtype=torch.int64)), 1)
    logits = model(out.sequences, attention_mask=full).logits[:, 8:-1].log_softmax(-1)
    want = logits.gather(-1, out.sequences[:, 9:, None]).squeeze(-1).sum(1)
    assert_close(out.sequences_scores, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_selects_and_repeats_rows():
    model = make_model()
    tokens, more = torch.randint(32, (3, 13)), torch.randint(32, (4, 9))
    cache = model(tokens, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    have = model(more, past_key_values=cache).logits
    want = model(torch.cat((tokens[[2, 2, 0, 0]], more), 1)).logits[:, 13:]
    assert_close(have, want, rtol=1e-4, atol=1e-5)


@given(seed=seeds, length=st.integers(2, 30), drop=st.integers(1, 6), conv=st.sampled_from([0, 1, 4]))
@torch.no_grad()
def test_crop(seed, length, drop, conv):
    """Tokens of the open chunk are taken back as if they had never come; others are refused, and nothing is lost."""
    model = make_model(seed, layer_types=["full_attention"] * 2, fwpkm_query_conv=conv)
    tokens, more = Draw(seed).integers(32, 2, length), Draw(seed + 1).integers(32, 2, 12)
    cache = FwPKMCache(model.config)
    for piece in tokens.split(5, dim=1):
        model(piece, past_key_values=cache)
    if drop > length % 8:
        with pytest.raises(ValueError, match=f"tokens is {drop}; expected at most the {length % 8} tokens of the open"):
            cache.crop(-drop)
        drop = 0
    else:
        cache.crop(-drop)
    have = model(more, past_key_values=cache).logits
    want = model(torch.cat((tokens[:, : length - drop], more), 1)).logits[:, length - drop :]
    assert_close(have, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_crop_does_not_reach_behind_a_mask():
    model = make_model(layer_types=["full_attention"] * 2)
    tokens, mask = prompts(3, [5, 3])
    cache = FwPKMCache(model.config)
    model(tokens, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="tokens is 1; expected at most 0, read since the last call with a mask"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="tokens_to_remove is 3; expected 0, or minus the tokens to take back"):
        cache.crop(3)


@torch.no_grad()
def test_assisted_generation_equals_greedy():
    """Prompt lookup proposes tokens and takes wrong ones back: the cache crops on the way."""
    model = make_model(layer_types=["full_attention"] * 2, fwpkm_chunk_size=64)
    tokens = torch.randint(1, 32, (1, 6)).repeat(1, 3)
    want = generate(model, tokens, new=20, do_sample=False)
    assert torch.equal(generate(model, tokens, new=20, do_sample=False, prompt_lookup_num_tokens=3), want)


@torch.no_grad()
def test_commit_after_prompt():
    """A prompt shorter than a chunk is in the memories' log, but is read only if it is committed."""
    model = make_model(fwpkm_chunk_size=64, fwpkm_write_scale="exact", layer_types=["sliding_attention"] * 2)
    tokens = torch.randint(1, 32, (2, 20))
    kept, committed = FwPKMCache(model.config), FwPKMCache(model.config)
    generate(model, tokens, **{CACHE: kept}, do_sample=False)
    generate(model, tokens, **{CACHE: committed}, do_sample=False, commit_after_prompt=True)
    counts = [(c.memories[0].memory.commits, c.memories[0].memory.origin) for c in (kept, committed)]
    assert counts == [(0, 0), (1, 20)]
    have = generate(model, tokens, do_sample=False, commit_after_prompt=True)
    by_hand = FwPKMCache(model.config)
    logits = model(tokens, past_key_values=by_hand).logits
    by_hand.flush()
    for _ in range(14):
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        logits = model(tokens[:, -1:], past_key_values=by_hand).logits
    assert torch.equal(have, tokens)


def test_bad_use():
    model = make_model()
    tokens = torch.randint(1, 32, (1, 4))
    with pytest.raises(ValueError, match=f"{CACHE} is DynamicCache; expected a FwPKMCache"):
        generate(model, tokens, **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="cache_implementation is static; expected None"):
        generate(model, tokens, cache_implementation="static")
    with pytest.raises(ValueError, match="commit_after_prompt is True; expected a cache"):
        generate(model, tokens, commit_after_prompt=True, use_cache=False)
