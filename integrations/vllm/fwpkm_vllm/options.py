"""Which models and options the plugin serves; whatever else is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.v1.attention.selector import get_attn_backend

from fwpkm.checks import require
from fwpkm.models import FwPKMConfig
from fwpkm_vllm import commit

LIMIT = "fast_weight_log_limit"
SOME_SIZE = 128  # of heads, which every attention of vLLM has


def log_limit(vllm_config: VllmConfig) -> int | None:
    """From how many tokens on a request's records are added up (``--additional-config``); None for never.

    Raises:
        ValueError: if it is no number of tokens.
    """
    others: Any = vllm_config.additional_config
    require(isinstance(others, dict), "additional_config", repr(others), "an object with {} or nothing", LIMIT)
    for name in others:
        require(name == LIMIT, "a key of additional_config", repr(name), repr(LIMIT))
    limit = others.get(LIMIT)
    whole = isinstance(limit, int) and not isinstance(limit, bool)
    require(limit is None or (whole and limit > 0), LIMIT, repr(limit), "a positive number of tokens")
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
        check_head_dim(vllm_config)
        limit, longest = log_limit(vllm_config), vllm_config.model_config.max_model_len
        within = limit is None or limit <= longest
        require(within, LIMIT, limit, "at most max_model_len ({}): no request is longer", longest)
        model = vllm_config.model_config
        asks = commit.processor(vllm_config, moves_keys(model.hf_config), folded=limit is not None)
        model.logits_processors = [*(model.logits_processors or ()), asks]


def check_model(config: FwPKMConfig) -> None:
    """Refuse models with layers that cannot be served, and numbers that are none, also those of ``--hf-overrides``.

    Raises:
        ValueError: naming the field of the configuration.
    """
    config.check()
    require(config.hidden_act == "silu", "hidden_act", config.hidden_act, "silu, which vLLM's layer has")
    served = ("full_attention", "sliding_attention")
    for kind in config.layer_types or ():
        require(kind in served, "layer_types", kind, "{}", " or ".join(served))


def check_head_dim(vllm_config: VllmConfig) -> None:
    """Refuse heads of a size that the attention which vLLM takes here has not, which it would say at the first request.

    Raises:
        ValueError: naming ``head_dim`` and the sizes that there are.
    """
    size, dtype = vllm_config.model_config.hf_config.head_dim, vllm_config.model_config.dtype
    with set_current_vllm_config(vllm_config, check_compile=False):
        try:
            backend = get_attn_backend(size, dtype, vllm_config.cache_config.cache_dtype)
        except ValueError:  # none has it, and vLLM names none
            backend = get_attn_backend(SOME_SIZE, dtype, vllm_config.cache_config.cache_dtype)
    sizes = backend.get_supported_head_sizes() or range(8, 513, 8)
    served = ", ".join(str(x) for x in sizes if backend.supports_head_size(x))
    require(backend.supports_head_size(size), "head_dim", size, "one that {} has: {}", backend.get_name(), served)


def moves_keys(config: FwPKMConfig) -> bool:
    """Whether each request has keys of its own, which commits move."""
    return bool(config.fwpkm_layers) and config.fwpkm_key_update == "fast"
