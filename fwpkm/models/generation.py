"""How ``generate`` calls the language model, and what it may not be asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from fwpkm.checks import require
from fwpkm.layers.host import CACHE, one_cache
from fwpkm.models.cache import FwPKMCache


class FwPKMGenerationMixin(GenerationMixin):
    """transformers' generation, with a cache that holds the memories, too."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: FwPKMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        commit_after_prompt: bool = False,
        past_key_values: FwPKMCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``generate`` calls :meth:`forward` with.

        ``generate(..., commit_after_prompt=True)`` commits the memories after the prompt. Without it, what the prompt's
        last, incomplete chunk says can be read back only once generation has filled that chunk; attention sees it
        as ever.
        """
        cache = one_cache(cache, past_key_values)
        if attention_mask is not None:  # looked at for prompts, not for every token
            one_more = cache is not None and cache.tokens + 1 == input_ids.shape[1]
            padded = cache.padded if cache and one_more else not attention_mask.all()
            attention_mask = attention_mask if padded else None
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            **{CACHE: cache},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if commit_after_prompt:
            require(cache is not None, "commit_after_prompt", True, "a cache, which keeps what is committed")
            inputs["commit_partial"] = bool(is_first_iteration)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get(CACHE)
        kind = generation_config.cache_implementation
        require(kind in (None, "dynamic"), "cache_implementation", kind, "None: the model brings its own cache")
        require(
            given is None or isinstance(given, FwPKMCache),
            CACHE,
            type(given).__name__,
            "a FwPKMCache, which holds the memories too",
        )
        if given is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = FwPKMCache(self.config)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
