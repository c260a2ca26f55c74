"""transformers' ``generate`` and cache over a model with memories: the same as computing everything anew."""

import dataclasses
import re
from functools import partial

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
from tests.test_models import LAYOUTS, MIXERS, make_config, make_model

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


@given(
    seed=seeds,
    layout=LAYOUTS,
    key_update=st.sampled_from(KEY_UPDATES),
    conv=st.sampled_from([0, 1, 4]),
    masked=st.booleans(),
    cuts=st.sets(st.integers(1, 29), max_size=5),
    drop=st.integers(0, 29),
)
@torch.no_grad()
def test_crop(seed, layout, key_update, conv, masked, cuts, drop):
    """Tokens are taken back as if they had never come: of any calls, committed ones too, masked and unmasked."""
    model = make_model(seed, fwpkm_query_conv=conv, fwpkm_key_update=key_update, fwpkm_learning_rate=0.3, **layout)
    model = model.double()
    draw = Draw(seed)
    tokens, more = draw.integers(32, 2, 30), draw.integers(32, 2, 12)
    mask = (draw.uniform(2, 42) < 0.7).long() if masked else torch.ones(2, 42, dtype=torch.int64)
    end = 30 - drop

    def read(cache, piece, start: int) -> Tensor:
        seen = cache.get_seq_length() + piece.shape[1]
        known = torch.cat((mask[:, : cache.get_seq_length()], mask[:, start : start + piece.shape[1]]), 1)
        assert known.shape[1] == seen
        return model(piece, attention_mask=known, cache=cache).logits

    def of(length: int) -> FwPKMCache:
        cache, start = FwPKMCache(model.config), 0
        for piece in tokens[:, :length].tensor_split(sorted(cut for cut in cuts if cut < length), dim=1):
            read(cache, piece, start)
            start += piece.shape[1]
        return cache

    cache = of(30)
    cache.crop(-drop)
    assert cache.get_seq_length() == end
    known = torch.cat((mask[:, :end], mask[:, 30:]), 1)
    have = model(more, attention_mask=known, cache=cache).logits
    want = model(torch.cat((tokens[:, :end], more), 1), attention_mask=known).logits[:, end:]
    real = known[:, end:].bool()
    assert_close(have[real], want[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", MIXERS)
@torch.no_grad()
def test_crop_is_whole_or_not_at_all(layers):
    model = make_model(layer_types=layers).double()
    tokens, more = torch.randint(32, (1, 140)), torch.randint(32, (1, 9))
    cache = FwPKMCache(model.config)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="tokens is 129; expected 0 to 128: the last 128 tokens can be taken back"):
        cache.crop(-129)
    with pytest.raises(ValueError, match="tokens_to_remove is 3; expected 0, or minus the tokens to take back"):
        cache.crop(3)
    cache.memories[1] = cache.memories[1]._replace(memory=dataclasses.replace(cache.memories[1].memory, trail=None))
    with pytest.raises(ValueError, match="tokens is 1; expected 0 to 0: the last 128"):
        cache.crop(-1)
    cache.crop(0)
    assert cache.get_seq_length() == 140
    have, want = model(more, cache=cache).logits, model(torch.cat((tokens, more), 1)).logits[:, 140:]
    assert_close(have, want, rtol=1e-4, atol=1e-4)


ASSISTANTS = {
    "itself": {},
    "another": {"seed": 1},
    "without memories": {"seed": 1, "fwpkm_layers": [], "layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("layers", MIXERS)
@pytest.mark.parametrize("how", ["prompt lookup", *ASSISTANTS])
@torch.no_grad()
def test_assisted_generation_is_greedy(layers, how):
    """Drafts that reach over chunks and windows and are taken back leave no trace, with padding on the left too."""
    odd = (MIXERS.index(layers) + len(how)) % 2
    key_update, commit = ("fast", True) if odd else ("slow", False)
    options = {"layer_types": layers, "fwpkm_key_update": key_update, "fwpkm_learning_rate": 0.3}
    model = make_model(0, **options).double()
    tokens = torch.cat((torch.full((1, 3), PAD), torch.randint(1, 32, (1, 6)).repeat(1, 4)), 1)
    mask = (tokens != PAD).long()
    if how in ASSISTANTS:
        drafts = {"assistant_model": make_model(**options | ASSISTANTS[how]).double()}
    else:
        drafts = {"prompt_lookup_num_tokens": 7}
    further = {"commit_after_prompt": True} if commit else {}
    want = generate(model, tokens, mask, new=24, do_sample=False, **further)
    assert torch.equal(generate(model, tokens, mask, new=24, do_sample=False, **drafts, **further), want)


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
    for drafts, name in (
        ({"prompt_lookup_num_tokens": 129}, "prompt_lookup"),
        ({"assistant_model": model}, "assistant"),
    ):
        model.generation_config.num_assistant_tokens = 129
        with pytest.raises(
            ValueError, match=f"num_{name}_tokens is 129|{name}_num_tokens is 129; expected at most 128"
        ):
            generate(model, tokens, **drafts)
    with pytest.raises(ValueError, match="assistant_early_exit is 1; expected None"):
        generate(model, tokens, assistant_early_exit=1)


@pytest.mark.parametrize("how", ["generate_batch", "init_continuous_batching", "paged"])
def test_continuous_batching_is_refused(how):
    """In one line, before anything starts."""
    model = make_model()
    tokens = torch.ones(1, 3, dtype=torch.int64)
    call = partial(generate, model, cache_implementation="paged") if how == "paged" else getattr(model, how)
    with pytest.raises(NotImplementedError, match=r"continuous batching .* use generate\(\), or serve .* with vLLM"):
        call(tokens=tokens)


@pytest.mark.parametrize("kind", ["paged|sdpa", "paged|eager", "flex_attention", "flash_attention_2"])
def test_attention_that_cannot_work_is_refused(kind):
    model = make_model()
    with pytest.raises(ValueError, match=f"attn_implementation is {re.escape(kind)}; expected eager, sdpa or windowed"):
        model.set_attn_implementation(kind)
    with pytest.raises(ValueError, match=f"attn_implementation is {re.escape(kind)}; expected eager, sdpa or windowed"):
        FwPKMForCausalLM(make_config(attn_implementation=kind))
