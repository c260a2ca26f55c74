"""What vLLM's engine does with the plugin, against ``fwpkm.models``: run by test_engine.py in a process of its own.

By hand: ``python -m pytest tests/serving/scenarios.py --noconftest -o filterwarnings=default``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm.models import FwPKMConfig, FwPKMForCausalLM
from fwpkm.training import checkpoint

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

from fwpkm_vllm import commit
from fwpkm_vllm.commit import CommitAfterPrompt
from fwpkm_vllm.pages import RecordPages
from vllm import LLM, SamplingParams
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, CompilationMode
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import set_forward_context
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

from tests.rounding import following
from tests.serving.kept import Kept, keeping

torch.set_num_threads(1)
VOCABULARY = 64
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 40,
    "max_position_embeddings": 4096,
    "fwpkm_layers": [0, 2],
    "fwpkm_n_subkeys": 12,
    "fwpkm_key_dim": 16,
    "fwpkm_value_dim": 12,  # three blocks of records fit into a page
    "fwpkm_query_conv": 5,
    "fwpkm_topk": 4,
    "fwpkm_chunk_size": 20,  # blocks are of 32 tokens
    "fwpkm_key_update": "slow",
    "fwpkm_write_scale": "exact",
    "pkm_layers": [1],
    "pkm_n_subkeys": 8,
    "pkm_key_dim": 8,
    "pkm_value_dim": 16,
    "pkm_heads": 2,
    "pkm_topk": 4,
    "tie_word_embeddings": True,
}
GREEDY = {"temperature": 0.0, "logprobs": 3}


def make(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> FwPKMForCausalLM:
    """A model in ``folder`` whose logits depend on what its memories hold."""
    torch.manual_seed(seed)
    model = FwPKMForCausalLM(FwPKMConfig(**MODEL | fields)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() == 2 and "memory" not in name:
                x *= 4
        for memory in model.memories():
            memory.output.weight *= 3
            memory.gate.bias += 1
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FwPKMForCausalLM:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make(folder)
    model.name_or_path = str(folder)
    return model


@contextlib.contextmanager
def engine(folder: str | Path, **options: Any) -> Iterator[LLM]:
    """vLLM with little memory, of which every page is dirty."""
    options = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 4096,
        "max_num_batched_tokens": 77,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
        "seed": 0,
        "enforce_eager": True,
    } | options
    llm = LLM(str(folder), skip_tokenizer_init=True, disable_log_stats=False, **options)
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        if isinstance(layer, RecordPages):  # whose bytes are those of attention's pages too
            layer.kv_cache.untyped_storage().fill_(0xFF)  # NaN, and slots below 0
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def scheduler(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def generate(llm: LLM, texts: list[list[int]], **sampling: Any) -> list[Any]:
    inputs: list[Any] = [{"prompt_token_ids": text} for text in texts]
    return llm.generate(inputs, SamplingParams(**GREEDY | sampling), use_tqdm=False)


@torch.no_grad()
def logits(model: FwPKMForCausalLM, ids: list[int], prompt: int, commit: bool = False) -> Tensor:
    """The model's own, from the last token of the prompt on."""
    if not commit:
        return model(torch.tensor([ids])).logits[0, prompt - 1 :]
    first = model(torch.tensor([ids[:prompt]]), use_cache=True, commit_partial=True)
    if len(ids) == prompt:
        return first.logits[0, -1:]
    rest = model(torch.tensor([ids[prompt:]]), past_key_values=first.past_key_values)
    return torch.cat((first.logits[0, -1:], rest.logits[0]))


def worst(
    model: FwPKMForCausalLM,
    text: list[int],
    completion: Any,
    greedy: bool = True,
    commit: bool = False,
    kept: Kept | None = None,
) -> float:
    """The largest difference of a log probability from the model's; tokens have to be the model's too.

    With logs in half precision the model goes on with the records that were ``kept``, having checked them.
    """
    ids = list(completion.token_ids)
    with contextlib.nullcontext() if kept is None else following(kept.of(text)):
        expected = logits(model, text + ids, len(text), commit)[:-1].float().log_softmax(-1)
    assert len(expected) == len(ids) == len(completion.logprobs)
    if greedy:
        assert expected.argmax(-1).tolist() == ids
    differences = [expected[i, t].item() - p.logprob for i, ps in enumerate(completion.logprobs) for t, p in ps.items()]
    return torch.tensor(differences).abs().max().item()  # NaN if any is


def check(model: FwPKMForCausalLM, texts: list[list[int]], results: list[Any], **how: Any) -> None:
    for text, result in zip(texts, results, strict=True):
        for completion in result.outputs:
            assert worst(model, text, completion, **how) < 1e-4


def test_any_number_of_requests(model):
    """Chunked prefill with an odd budget, requests that wait for others, 60 decoded tokens across chunk boundaries."""
    texts = prompts(1, 2, 2500, *torch.randint(1, 300, (29,), generator=torch.Generator().manual_seed(1)).tolist())
    with engine(model.name_or_path) as llm:
        check(model, texts, generate(llm, texts, max_tokens=60))
        check(model, texts[:1], generate(llm, texts[:1], max_tokens=5))


def test_memories_matter_and_faults_show(model, monkeypatch):
    """The comparison would notice: a memory whose chunks are one token off gives other probabilities."""
    from fwpkm_vllm.step import Batch

    chunks = Batch.chunks

    def late(self: Batch, chunk_size: int, positions: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
        number, start = chunks(self, chunk_size, (positions - 1).clamp_min(0), requests)
        return number, (start - 1).clamp_min(0)

    monkeypatch.setattr(Batch, "chunks", late)
    texts = prompts(100)
    with engine(model.name_or_path) as llm, pytest.raises(AssertionError):
        check(model, texts, generate(llm, texts, max_tokens=20))


def test_a_step_is_tried_without_pages(model):
    """As vLLM does to find out how much memory a step takes; its attention then returns what it finds in memory."""
    with engine(model.name_or_path) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        runner = worker.model_runner
        with set_forward_context(None, llm.llm_engine.vllm_config, num_tokens=77):
            torch.use_deterministic_algorithms(True)  # which is NaN then
            hidden = runner.model(torch.zeros(77, dtype=torch.int64), torch.arange(77))
            torch.use_deterministic_algorithms(False)
        assert hidden.shape == (77, 48)
        assert hidden.isnan().all()
        check(model, prompts(50), generate(llm, prompts(50), max_tokens=3))


def test_prefixes_are_shared(model):
    """Prompts that part from a cached one in the middle of a block or chunk, on a block's last token, and after it."""
    (base,) = prompts(400)
    other = prompts(200, seed=5)[0]
    hits = []
    with engine(model.name_or_path, prefix_cache_retention_interval=None) as llm:
        check(model, [base], generate(llm, [base], max_tokens=40))
        for common in (64, 95, 96, 97, 128, 191, 192, 200, 255, 287, 288, 399, 400):
            text = base[:common] + other
            results = generate(llm, [text], max_tokens=25)
            check(model, [text], results)
            hits.append((common, results[0].num_cached_tokens))
        results = generate(llm, [base[:300] + other, base[:300] + other[:50], base], max_tokens=25)  # side by side
        check(model, [base[:300] + other, base[:300] + other[:50], base], results)
    assert hits == [(common, common // 96 * 96) for common, _ in hits]


def test_requests_lose_their_pages(model):
    texts = prompts(150, 170, 190, 210, 160, 180)
    with engine(model.name_or_path, num_gpu_blocks_override=130, max_num_batched_tokens=256, max_model_len=512) as llm:
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        preempted = []
        original = scheduler(llm)._preempt_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.request_id)
            return original(request, *args, **kwargs)

        scheduler(llm)._preempt_request = counting
        check(model, texts, generate(llm, texts, max_tokens=120))
        assert preempted
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


LIMIT = {"additional_config": {"fast_weight_log_limit": 100}}  # blocks of 96 tokens, chunks of 20: 480
SHORT = {"fwpkm_n_subkeys": 32}  # rows of a version take seven pages


def held(llm: LLM, request: str) -> dict[type, int]:
    """Pages that a request has, by their kind."""
    from fwpkm_vllm.sharing import FoldedSpec, StretchSpec

    manager = scheduler(llm).kv_cache_manager
    counts = {StretchSpec: 0, FoldedSpec: 0}
    for group, blocks in zip(
        manager.kv_cache_config.kv_cache_groups, manager.coordinator.get_blocks(request), strict=True
    ):
        if (kind := type(group.kv_cache_spec)) in counts:
            counts[kind] = max(counts[kind], sum(not block.is_null for block in blocks))
    return counts


def test_logs_are_folded(tmp_path):
    """Prompts and answers across several stretches, side by side; what a request holds stays as it is."""
    from fwpkm_vllm.folded import Folded

    model, made = make(tmp_path, **SHORT), 0
    texts = prompts(1, 460, 479, 480, 481, 1500, seed=4)
    with engine(tmp_path, **LIMIT) as llm, pytest.MonkeyPatch.context() as patch:
        original, most = Folded.make, [0, 0]

        def counting(*args: Any) -> None:
            nonlocal made
            made += 1
            original(*args)
            now = [list(held(llm, name).values()) for name in scheduler(llm).requests]
            most[:] = [max(column) for column in zip(most, *now, strict=True)]

        patch.setattr(Folded, "make", counting)
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        check(model, texts, generate(llm, texts, max_tokens=30))
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert made == 2 * (3 + 4), "two layers; three stretches of the longest, one of the four next"
    assert most == [(480 + 77) // 96 + 1, 2 * 7]


def test_prefixes_of_folded_requests_are_shared(tmp_path):
    """Prompts that part from a long one before, at and after the ends of stretches, and go on through the next."""
    model = make(tmp_path, **SHORT)
    (base,), (other,) = prompts(1500), prompts(100, seed=5)
    hits = []
    with engine(tmp_path, prefix_cache_retention_interval=None, **LIMIT) as llm:
        check(model, [base], generate(llm, [base], max_tokens=5))
        for common in (100, 479, 480, 600, 960, 1439, 1440, 1500):
            text = base[:common] + other
            results = generate(llm, [text], max_tokens=25)
            check(model, [text], results)
            hits.append((common, results[0].num_cached_tokens))
        texts = [base + other, base[:1000] + other, base]
        check(model, texts, generate(llm, texts, max_tokens=25))
        texts = prompts(530, seed=9)  # whose samples begin in the step that completes the first stretch
        check(model, texts, generate(llm, texts, max_tokens=25, n=3, temperature=1.0), greedy=False)
    assert hits == [(common, common // 96 * 96) for common, _ in hits]


def test_folded_requests_lose_their_pages(tmp_path):
    """More requests than there are pages for, of which many begin alike: pages are taken back, kept, and found."""
    model = make(tmp_path, **SHORT)
    (base,) = prompts(1000, seed=6)
    own = prompts(70, 150, 10, 300, 40, seed=7)
    texts = [base[:common] + text for common, text in zip((1000, 500, 960, 700, 0), own, strict=True)]
    options: dict[str, Any] = {"prefix_cache_retention_interval": None, "max_num_batched_tokens": 256}
    with engine(tmp_path, num_gpu_blocks_override=240, max_model_len=1280, **options, **LIMIT) as llm:
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        preempted, original = [], scheduler(llm)._preempt_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.request_id)
            return original(request, *args, **kwargs)

        scheduler(llm)._preempt_request = counting
        cached = 0
        for _ in range(2):
            results = generate(llm, texts, max_tokens=50)
            check(model, texts, results)
            cached += sum(result.num_cached_tokens for result in results)
        assert preempted
        assert cached > 480
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.numerical
def test_folded_logs_beside_windows_alone(tmp_path):
    """Where no other layer keeps all tokens new blocks are filled with zeros all the same."""
    model = make(tmp_path, layer_types=["sliding_attention"] * 3, fwpkm_log_dtype="bfloat16", **SHORT)
    texts = prompts(700, 1000, 60, 500, seed=8)
    with engine(tmp_path, **LIMIT) as llm, keeping(llm, lookahead=1) as kept:
        for _ in range(2):
            check(model, texts, generate(llm, texts, max_tokens=40), kept=kept)


def test_rows_that_fit_into_no_page_are_refused(tmp_path):
    make(tmp_path, fwpkm_value_dim=2100)
    with pytest.raises(ValueError, match="block_size is 32; expected more: 8400 bytes"), engine(tmp_path, **LIMIT):
        pass


FAST = {"fwpkm_key_update": "fast", "fwpkm_addressing_weight": 0.1}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"fwpkm_chunk_size": 32, "fwpkm_heads": 2, "fwpkm_key_dim": 48, "fwpkm_n_subkeys": 25}, {}),
        ({"fwpkm_chunk_size": 7, "fwpkm_score": "dot", "fwpkm_query_conv": 0}, {"max_num_batched_tokens": 300}),
        (SHORT, LIMIT),
    ],
    ids=["unaligned chunks", "several pages a version", "many chunks a step", "folded logs"],
)
def test_keys_that_move(tmp_path, fields, options):
    """Many requests at once, in pieces of all lengths, with 60 decoded tokens each across chunk boundaries."""
    model = make(tmp_path, seed=3, **FAST | fields)
    texts = prompts(1, 2, 900, 33, 64, 19, 20, 21, 150, 100, 300, 7)
    still = make(tmp_path / "still", seed=3, **FAST | fields | {"fwpkm_key_update": "train_only"})
    changed = logits(model, texts[2], 100) - logits(still, texts[2], 100)
    assert changed.abs().max() > 1e-2, "this prompt must be one where moves of keys show"
    with engine(tmp_path, **options) as llm:
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        check(model, texts, generate(llm, texts, max_tokens=60))
        check(model, texts[5:6], generate(llm, texts[5:6], max_tokens=25))
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("chunk_size", [32, 20, 160])
def test_prefixes_are_shared_where_keys_move(tmp_path, chunk_size):
    """Wherever blocks of all kinds end, whether or not chunks do, and whole chunks within a step."""
    model = make(tmp_path, seed=3, **FAST | {"fwpkm_chunk_size": chunk_size})
    (base,), (other,) = prompts(400), prompts(50, seed=5)
    hits = []
    with engine(tmp_path, prefix_cache_retention_interval=None) as llm:
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        check(model, [base], generate(llm, [base], max_tokens=40))
        for common in (64, 95, 96, 97, 192, 255, 287, 288, 399, 400):
            text = base[:common] + other
            results = generate(llm, [text], max_tokens=25)
            check(model, [text], results)
            hits.append((common, results[0].num_cached_tokens))
        texts = [base[:300] + other, base[:300] + other[:20], base]  # side by side
        check(model, texts, generate(llm, texts, max_tokens=25))
        texts = prompts(90, 33, seed=9)
        check(model, texts, generate(llm, texts, max_tokens=25, n=3, temperature=1.0), greedy=False)
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert hits == [(common, common // 96 * 96) for common, _ in hits]


@pytest.mark.parametrize("chunk_size", [32, 20])
def test_requests_with_keys_of_their_own_lose_their_pages(tmp_path, chunk_size):
    """Preempted while others go on, of which some begin alike."""
    model = make(tmp_path, seed=3, **FAST | {"fwpkm_chunk_size": chunk_size})
    texts = prompts(150, 170, 190, 210, 160)
    texts.append(texts[3][:200] + texts[0])
    with engine(tmp_path, num_gpu_blocks_override=210, max_num_batched_tokens=256, max_model_len=512) as llm:
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        preempted = []
        original = scheduler(llm)._preempt_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.request_id)
            return original(request, *args, **kwargs)

        scheduler(llm)._preempt_request = counting
        for _ in range(2):
            check(model, texts, generate(llm, texts, max_tokens=120))
        assert preempted
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_it_says_what_moving_keys_take(tmp_path, monkeypatch):
    from fwpkm_vllm import pages

    said = []
    monkeypatch.setattr(pages.logger, "info_once", lambda text, *values: said.append(text % values))
    make(tmp_path, **FAST | {"fwpkm_n_subkeys": 100, "fwpkm_chunk_size": 40})
    with engine(tmp_path):
        pass
    lines = {line.split(":")[0]: line for line in said}
    # 200 sub-keys of 8 numbers, 256 in a page of attention's 8,192 bytes
    keys = "a request of 40 tokens or more has 0.008 MB of them a memory layer, in 1 pages (0.002 MB of it padding)"
    assert keys in lines["Keys that move"]
    assert "85 bytes a token and memory layer, at most 0.008 MB a request" in lines["Queries of open chunks"]


def test_several_samples_of_a_prompt(model):
    """The samples begin in one step, and each needs what the others read of the prompt."""
    texts = prompts(90, 33, 65, 61)
    with engine(model.name_or_path, max_num_batched_tokens=300, max_num_seqs=16) as llm:
        results = generate(llm, texts, max_tokens=50, n=4, temperature=1.0)
    assert len({tuple(completion.token_ids) for completion in results[0].outputs}) > 1
    check(model, texts, results, greedy=False)


def test_aborted_requests_leave_nothing(model):
    texts = prompts(200, 120, 64, 300, seed=2)
    with engine(model.name_or_path) as llm:
        core, free = llm.llm_engine, scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        names = []
        for i, text in enumerate(texts):
            params = SamplingParams(**GREEDY, max_tokens=40)
            names.append(core.add_request(str(i), {"prompt_token_ids": text}, params) or str(i))
        finished = {}
        for step in range(400):
            for output in core.step():
                if output.finished:
                    finished[output.request_id.split("-")[0]] = output
            if step == 5:  # one while its prompt is read, one while it decodes
                core.abort_request([names[0], names[3]])
            if not core.has_unfinished_requests():
                break
        survivors = [finished[i] for i in ("1", "2")]
        check(model, texts[1:3], survivors)
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize(
    "fields",
    [
        {
            "fwpkm_query_conv": 0,
            "fwpkm_value_dim": 32,
            "fwpkm_lookahead": 2,
            "fwpkm_chunk_size": 32,
            "fwpkm_write_scale": "reference",
        },
        {"fwpkm_heads": 2, "fwpkm_key_update": "train_only", "fwpkm_score": "dot", "fwpkm_nonlinearity": "relu"},
        {"fwpkm_log_dtype": "bfloat16", "layer_types": ["sliding_attention"] * 3, "tie_word_embeddings": False},
        {"layer_types": ["full_attention"] * 3, "fwpkm_query_conv": 0, "fwpkm_lookahead": 0, "pkm_layers": []},
    ],
    ids=["reference", "heads", "bfloat16 log", "full attention"],
)
@pytest.mark.numerical
def test_other_models(tmp_path, fields):
    model = make(tmp_path, seed=3, **{"fwpkm_learning_rate": 0.3} | fields)
    texts = prompts(1, 45, 250, seed=3)
    half = model.config.fwpkm_log_dtype != "float32"
    with engine(tmp_path) as llm, keeping(llm, lookahead=1) as kept:
        check(model, texts, generate(llm, texts, max_tokens=45), kept=kept if half else None)


def test_half_precision(tmp_path):
    """Rounding differs between implementations; what is compared is how often and how far."""
    model = make(tmp_path, torch.bfloat16)
    exact = make(tmp_path / "exact")
    texts = prompts(60, 200, 333)
    with engine(tmp_path, dtype="bfloat16") as llm:
        results = generate(llm, texts, max_tokens=50)
    ours, theirs, agree = [], [], []
    for text, result in zip(texts, results, strict=True):
        completion = result.outputs[0]
        ids = list(completion.token_ids)
        expected, true = (logits(m, text + ids, len(text))[:-1].float().log_softmax(-1) for m in (model, exact))
        for i, token in enumerate(ids):
            got = completion.logprobs[i][token].logprob
            ours.append(abs(got - true[i, token].item()))
            theirs.append(abs(expected[i, token].item() - true[i, token].item()))
            agree.append(int(expected[i].argmax()) == token)
    ours, theirs = torch.tensor(ours).median(), torch.tensor(theirs).median()
    assert ours < 2 * theirs + 0.01, (ours, theirs)  # as far from float32 as transformers in bfloat16
    assert sum(agree) / len(agree) > 0.85


@pytest.mark.parametrize("scale", ["exact", "reference"])
def test_commit_after_prompt(tmp_path, scale):
    model = make(tmp_path, fwpkm_write_scale=scale, fwpkm_learning_rate=0.5)
    texts = prompts(30, 47, 60, 111, 23)  # chunks of 20 tokens
    asked = [True, True, False, True, True]
    with engine(tmp_path, enable_prefix_caching=False, num_gpu_blocks_override=150, max_model_len=512) as llm:
        params = [
            SamplingParams(**GREEDY, max_tokens=70, extra_args={"commit_after_prompt": True} if flag else None)
            for flag in asked
        ]
        inputs: list[Any] = [{"prompt_token_ids": text} for text in texts]
        results = llm.generate(inputs, params, use_tqdm=False)
        for text, flag, result in zip(texts, asked, results, strict=True):
            assert worst(model, text, result.outputs[0], commit=flag) < 1e-4
        changed = logits(model, texts[0] + [1] * 9, 30) - logits(model, texts[0] + [1] * 9, 30, commit=True)
        assert changed.abs().max() > 1e-2, "this prompt must be one where a commit shows"
        with pytest.raises(VLLMValidationError, match=r"commit_after_prompt is 'yes'; expected true or false"):
            generate(llm, texts[:1], extra_args={"commit_after_prompt": "yes"})


def test_requests_are_followed_to_their_rows():
    """Removed, added, moved, in this order, as vLLM's batch does it."""
    from types import SimpleNamespace

    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    layers = SimpleNamespace(static_forward_context={})
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=6), compilation_config=layers)
    followed = CommitAfterPrompt(config, torch.device("cpu"), False)
    asked = SamplingParams(extra_args={"commit_after_prompt": True})

    def update(removed: list[int], added: list[Any], moved: list[Any]) -> list[int]:
        followed.update_state(BatchUpdate(batch_size=6, removed=removed, added=added, moved=moved))
        return followed.origins.tolist()

    start = [(0, asked, [1] * 3, []), (1, SamplingParams(), [1] * 4, []), (2, asked, [1] * 5, [])]
    assert update([], start, []) == [3, 0, 5, 0, 0, 0]
    assert update([], [], [(0, 1, MoveDirectionality.SWAP)]) == [0, 3, 5, 0, 0, 0]
    assert update([1], [], [(2, 1, MoveDirectionality.UNIDIRECTIONAL)]) == [0, 5, 0, 0, 0, 0]
    assert update([0], [(0, asked, [1] * 7, [])], []) == [7, 5, 0, 0, 0, 0]
    followed.update_state(None)
    assert followed.asked
    assert update([0, 1], [], []) == [0] * 6
    assert not followed.asked


def test_commit_after_prompt_is_refused_by_engines_that_rely_on_where_chunks_end(model):
    """Each engine for itself, whichever came after it in the process."""
    alone = {"enable_prefix_caching": False}
    expected: list[tuple[dict[str, Any], str]] = [
        (alone, ""),
        ({}, "no-enable-prefix-caching"),
        (LIMIT | alone, "without fast_weight_log_limit"),
        ({"hf_overrides": {"fwpkm_key_update": "fast"}} | alone, "a model whose keys stay"),
    ]
    plain: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 4096}
    configs = [EngineArgs(model.name_or_path, **plain | x).create_engine_config() for x, _ in expected]
    asked = SamplingParams(extra_args={"commit_after_prompt": True})
    for config, (_, message) in zip(configs, expected, strict=True):
        (kind,) = config.model_config.logits_processors
        assert pickle.loads(pickle.dumps(kind)) is kind  # engines run in processes of their own
        with pytest.raises(VLLMValidationError, match=message) if message else contextlib.nullcontext():
            validate_logits_processors_parameters([kind], asked)
        validate_logits_processors_parameters([kind], SamplingParams())


def test_commit_after_prompt_is_refused_on_runner_v2():
    from types import SimpleNamespace

    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    config: Any = SimpleNamespace(use_v2_model_runner=True)
    validate = build_custom_logits_processors_params_validator([commit.processor(config, False, False)])
    validate(SamplingParams())
    with pytest.raises(
        VLLMValidationError, match=r"commit_after_prompt is True; expected .* VLLM_USE_V2_MODEL_RUNNER=0"
    ):
        validate(SamplingParams(extra_args={"commit_after_prompt": True}))


def test_engines_in_one_process_follow_their_own_requests(model):
    """Another engine's requests commit, and these do not, though they have the same rows."""
    texts = prompts(30, 47)
    options = {"enable_prefix_caching": False, "num_gpu_blocks_override": 150, "max_model_len": 512}
    with engine(model.name_or_path, **options) as first:
        second = CommitAfterPrompt(copy.deepcopy(first.llm_engine.vllm_config), torch.device("cpu"), False)
        second.origins[:2], second.asked = 7, True
        check(model, texts, generate(first, texts, max_tokens=40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2; expected 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2; expected 1"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config is ngram"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer_config is"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager is True; expected false"),
        ({"additional_config": {"fast_weight_log_limit": 0}}, "fast_weight_log_limit is 0; expected a positive number"),
        ({"additional_config": {"fast_weight_log_limit": "1K"}}, "fast_weight_log_limit is '1K'; expected a positive"),
        ({"additional_config": {"fast_weight_log_limit": True}}, "fast_weight_log_limit is True; expected a positive"),
        ({"additional_config": {"fast_weight_log_limit": 64.0}}, "fast_weight_log_limit is 64.0; expected a positive"),
        ({"additional_config": {"fast_weight_log_limit": 10**12}}, r"0; expected at most max_model_len \(4096\)"),
        ({"additional_config": {"fast_weight_log_limt": 64}}, "is 'fast_weight_log_limt'; expected 'fast_weight_log_l"),
        ({"hf_overrides": {"head_dim": 24}}, "head_dim is 24; expected one that CPU_ATTN has: 32, 64, 80"),
        ({"hf_overrides": {"fwpkm_score_eps": math.inf}}, "fwpkm_score_eps is inf; expected a number > 0, and finite"),
        ({"hf_overrides": {"fwpkm_topk": "8"}}, "fwpkm_topk is '8'; expected an integer"),
        ({"hf_overrides": {"fwpkm_tpok": 8}}, "a field is 'fwpkm_tpok'; expected fields of"),
        ({"hf_overrides": {"hidden_act": "gelu"}}, "hidden_act is gelu; expected silu"),
        ({"hf_overrides": {"layer_types": ["linear_attention"] * 3}}, "layer_types is linear_attention; expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_served_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs(model.name_or_path, skip_tokenizer_init=True, dtype="float32", **options).create_engine_config()


VALUES, QUERIES = "model.layers.2.memory.values", "model.layers.1.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "absent": (lambda x: x.pop(VALUES), f"without {VALUES}"),
    "part of a fused one": (lambda x: x.pop(QUERIES), f"without {QUERIES}"),
    "many": (lambda x: [x.pop(name) for name in list(x)[3:]], "without .* and [0-9]+ more"),
    "unknown": (lambda x: x.update(other=torch.zeros(2)), "with other; expected tensors of the model"),
    "misspelled": (lambda x: x.update({f"{VALUES}2": torch.zeros(2)}), f"with {VALUES}2; expected tensors"),
    "shape": (lambda x: x.update({VALUES: x[VALUES][:-1].clone()}), rf"{VALUES}.shape is \[143, 12\]; expected \[144"),
    "shape of a fused one": (lambda x: x.update({QUERIES: torch.zeros(3, 48)}), rf"{QUERIES}.shape is \[3, 48\]"),
    "NaN": (lambda x: x[VALUES].view(-1)[7:8].fill_(torch.nan), f"{VALUES} holds NaN or infinities"),
    "infinite": (lambda x: x[QUERIES].view(-1)[7:8].fill_(-torch.inf), f"{QUERIES} holds NaN or infinities"),
    "dtype": (lambda x: x.update({QUERIES: x[QUERIES].int()}), f"{QUERIES}.dtype is torch.int32; expected torch.float"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    change, message = DAMAGE[damage]
    make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message), engine(tmp_path):
        pass


def test_the_folder_of_a_training_is_served(tmp_path):
    """With the optimizer's tensors beside those of the model, by vLLM and by transformers."""
    model = make(tmp_path / "model")
    state = checkpoint.TrainingState(1, 1.0, {}, {})
    optimizer = {f"{name}.exp_avg": torch.zeros_like(x) for name, x in model.named_parameters()}
    checkpoint.save(tmp_path, state, model.save_pretrained, optimizer, keep=1)
    folder = checkpoint.path_of(tmp_path, 1)
    texts = prompts(30)
    with engine(folder) as llm:
        check(FwPKMForCausalLM.from_pretrained(folder).eval(), texts, generate(llm, texts, max_tokens=10))


def test_a_compiled_model(model):
    """As without ``enforce_eager``: one graph, in which a memory layer is one operator."""
    from torch._dynamo.utils import counters

    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    texts = prompts(1, 50, 90)
    with torch._dynamo.config.patch(disable=False), pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_USE_AOT_COMPILE", "TORCHDYNAMO_DISABLE"):
            patch.setenv(name, "0")
        patch.setattr(CompilationConfig, "init_backend", lambda *_, **__: keep)  # or Inductor would compile for minutes
        with engine(model.name_or_path, enforce_eager=False) as llm:
            check(model, texts, generate(llm, texts, max_tokens=40))
    assert not counters["graph_break"]
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert operators.count("fwpkm_vllm.memory_") == 2
    assert operators.count("vllm.unified_attention_with_output") == 3

    # Where vLLM captures graphs it does so between these operators, as between those of attention.
    settings = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    settings.set_splitting_ops_for_v1("naive")
    _, pieces = split_graph(graph, settings.splitting_ops)
    between = [[str(x.target) for x in piece.graph.graph.nodes] for piece in pieces if piece.is_splitting_graph]
    assert sum("fwpkm_vllm.memory_" in targets for targets in between) == 2
    others = [str(x.target) for piece in pieces if not piece.is_splitting_graph for x in piece.graph.graph.nodes]
    assert "fwpkm_vllm.memory_" not in others


def test_slots_that_requests_touch_are_said(model, monkeypatch):
    """After 1, 2, 4, ... chunks of 20 tokens, of each request and memory layer."""
    from fwpkm_vllm import touched

    said = []

    def info(line: str, *figures: float, **_: Any) -> None:
        if "touched" in line:  # others write to the same log
            said.append(figures)

    monkeypatch.setattr(touched, "INTERVAL", 0.0)
    monkeypatch.setattr(touched.logger, "info", info)
    texts = prompts(19, 50, 190)
    with engine(model.name_or_path) as llm:
        generate(llm, texts, max_tokens=1)
    with torch.no_grad():
        slots = [model(torch.tensor([text]), output_memories=True).slots for text in texts]
    expected = [
        100 * len(set(layer[0, :tokens].flatten().tolist())) / 144
        for layers, text in zip(slots, texts, strict=True)
        for layer in layers
        for tokens in (20, 40, 80, 160)
        if tokens <= len(text)
    ]
    for mean, n_slots, most, count in said:
        assert n_slots == 144
        assert any(abs(most - share) < 1e-9 for share in expected)
        assert mean <= most + 1e-9
        assert count >= 1
    # A step has 77 tokens for all requests, and counts once what it doubles more than once.
    assert 4 <= sum(count for *_, count in said) <= len(expected)
