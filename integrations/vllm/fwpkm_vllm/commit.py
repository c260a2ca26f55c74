"""``commit_after_prompt``: requests whose memories commit where their prompt ends (:meth:`fwpkm.MemoryState.flush`).

vLLM tells a model nothing about a request but its tokens. It does tell logits processors, before every forward, whose
requests stand in which row of the batch; so this one changes no logits, and remembers where prompts end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as RunnerV2LogitsProcessor

from fwpkm.checks import require

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NAME = "commit_after_prompt"
PLACE = "fwpkm_vllm.commit_after_prompt"  # among an engine's layers, where metadata builders find its processor


class CommitAfterPrompt(LogitsProcessor):
    """Where the memories of the requests in each row of the batch commit early.

    vLLM knows logits processors as classes, which it checks requests with before there is an engine, in another process
    perhaps. So nothing of an engine is kept in a class: whether it serves the argument is a matter of which class it
    gets, and the instance is kept among the engine's layers.
    """

    expected: ClassVar[str | None] = None  # instead, in the engines of this class, where it is not served

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.origins = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int64)
        self.asked = False
        vllm_config.compilation_config.static_forward_context[PLACE] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what is no flag, and commits where something relies on where chunks end."""
        check(sampling_params, cls.expected)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows; vLLM calls this before each forward."""
        if batch_update is None:
            return
        origins = self.origins
        for row in batch_update.removed:
            origins[row] = 0
        for row, params, prompt, _ in batch_update.added:
            asked = (params.extra_args or {}).get(NAME, False)
            origins[row] = len(prompt) if asked and prompt is not None else 0
        for source, target, direction in batch_update.moved:
            there = origins[target].clone()
            origins[target] = origins[source]
            origins[source] = there if direction == MoveDirectionality.SWAP else 0
        self.asked = bool(origins.any())

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits


class WhereKeysMove(CommitAfterPrompt):
    """Refuses: keys are made where chunks end."""

    expected = "false, or a model whose keys stay: theirs are made where chunks end"


class WhereLogsAreFolded(CommitAfterPrompt):
    """Refuses: stretches are whole chunks."""

    expected = "false, or a server without fast_weight_log_limit: stretches of tokens are whole chunks"


class WherePagesAreShared(CommitAfterPrompt):
    """Refuses: the records after an early commit are no function of the tokens alone."""

    expected = "false, or a server with --no-enable-prefix-caching: commits change records"


class OnRunnerV2(RunnerV2LogitsProcessor):
    """Refuses: this runner, whose logits processors are of another kind, does not say which row a request has."""

    expected: ClassVar[str] = "false, or a server with VLLM_USE_V2_MODEL_RUNNER=0: other runners do not tell of rows"

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what is no flag, and commits."""
        check(sampling_params, cls.expected)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether logits are changed: never."""
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        return logits


def check(sampling_params: SamplingParams, expected: str | None) -> None:
    """Refuse what is no flag, and a commit where something else is ``expected``.

    Raises:
        ValueError: naming the argument.
    """
    asked = (sampling_params.extra_args or {}).get(NAME, False)
    require(asked in (0, 1), NAME, repr(asked), "true or false")  # vLLM's HTTP interface makes a number of a flag
    require(not asked or expected is None, NAME, asked, "{}", expected)


def processor(vllm_config: VllmConfig, keys_move: bool, folded: bool) -> type:
    """What an engine checks its requests with, and follows them."""
    if vllm_config.use_v2_model_runner:
        return OnRunnerV2
    if keys_move:
        return WhereKeysMove
    if folded:
        return WhereLogsAreFolded
    return WherePagesAreShared if vllm_config.cache_config.enable_prefix_caching else CommitAfterPrompt


def origins(vllm_config: VllmConfig, requests: int, device: torch.device) -> Tensor | None:
    """Where the memories of the engine's ``requests`` in the batch commit early, or None if none does."""
    current: Any = vllm_config.compilation_config.static_forward_context.get(PLACE)
    if current is None or not current.asked:
        return None
    return current.origins[:requests].to(device, non_blocking=True)
