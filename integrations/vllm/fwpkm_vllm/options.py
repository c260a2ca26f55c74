"""Which models and options the plugin serves; whatever else is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from fwpkm.checks import require
from fwpkm.models import FwPKMConfig
from fwpkm_vllm.commit import CommitAfterPrompt

LIMIT = "fast_weight_log_limit"


def log_limit(vllm_config: VllmConfig) -> int | None:
    """From how many tokens on a request's records are added up (``--additional-config``); None for never.

    Raises:
        ValueError: if it is no number of tokens.
    """
    others: Any = vllm_config.additional_config
    limit = others.get(LIMIT) if isinstance(others, dict) else None
    if limit is not None:
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        require(whole and limit > 0, LIMIT, repr(limit), "a positive number of tokens")
    return limit


class Options(VerifyAndUpdateConfig):
    """What vLLM asks about a configuration when it is made, in the process that the user started."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot be served, and let requests ask for ``commit_after_prompt``.

        Raises:
            ValueError: naming the option, its value and what is expected.
        """
        check_model(vllm_config.model_config.hf_config)
        parallel = vllm_config.parallel_config
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ):
            size = getattr(parallel, name)
            require(size == 1, name, size, "1: the memory layers are not divided; data_parallel_size copies the model")
        speculative = vllm_config.speculative_config
        method = None if speculative is None else speculative.method
        require(speculative is None, "speculative_config", method, "none: what a memory has stored is not taken back")
        transfer = vllm_config.kv_transfer_config
        connector = None if transfer is None else transfer.kv_connector
        require(transfer is None, "kv_transfer_config", connector, "none: connectors do not know the memories' records")
        single = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        require(not single, "disable_hybrid_kv_cache_manager", single, "false: records are kept for different times")
        limit = log_limit(vllm_config)
        if not vllm_config.use_v2_model_runner:  # whose logits processors are others
            if moves_keys(vllm_config.model_config.hf_config):
                CommitAfterPrompt.refused = "false, or a model whose keys stay: theirs are made where chunks end"
            elif limit is not None:
                CommitAfterPrompt.refused = f"false, or a server without {LIMIT}: stretches of tokens are whole chunks"
            elif vllm_config.cache_config.enable_prefix_caching:
                CommitAfterPrompt.refused = "false, or a server with --no-enable-prefix-caching: commits change records"
            else:
                CommitAfterPrompt.refused = None
            model = vllm_config.model_config
            model.logits_processors = [*(model.logits_processors or ()), CommitAfterPrompt]


def check_model(config: FwPKMConfig) -> None:
    """Refuse models with layers that cannot be served.

    Raises:
        ValueError: naming the field of the configuration.
    """
    served = ("full_attention", "sliding_attention")
    for kind in config.layer_types or ():
        require(kind in served, "layer_types", kind, "{}", " or ".join(served))


def moves_keys(config: FwPKMConfig) -> bool:
    """Whether each request has keys of its own, which commits move."""
    return bool(config.fwpkm_layers) and config.fwpkm_key_update == "fast"
