"""How ``generate`` calls the language model, and what it may not be asked for."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from fwpkm.checks import require
from fwpkm.layers.host import CACHE, one_cache
from fwpkm.memory.trail import REACH
from fwpkm.models.cache import FwPKMCache


class FwPKMGenerationMixin(GenerationMixin):
    """transformers' generation, with a cache that holds the memories, too."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of any of transformers' models, and without compilation, also where the forward is compiled.

        The states of memories and attention grow with every token, and a graph would be made for each of their sizes;
        what decodes in two graphs is :func:`fwpkm.compile.compile_step`.
        """
        with torch.compiler.set_stance("force_eager"):
            return super().generate(*args, **kwargs)

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

    def _get_candidate_generator(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        assistant_model: PreTrainedModel | None = None,
        model_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        early = generation_config.assistant_early_exit
        require(early is None, "assistant_early_exit", early, "None: another model, or prompt_lookup_num_tokens")
        drafts = generation_config.prompt_lookup_num_tokens
        name = "prompt_lookup_num_tokens"
        if assistant_model is not None:
            drafts, name = assistant_model.generation_config.num_assistant_tokens, "num_assistant_tokens"
        require((drafts or 0) <= REACH, name, drafts, "at most {}, which can be taken back", REACH)
        commits = model_kwargs.get("commit_after_prompt", False)
        others = {key: x for key, x in model_kwargs.items() if key != "commit_after_prompt"}  # an assistant has its own
        generator = super()._get_candidate_generator(
            generation_config, *args, assistant_model=assistant_model, model_kwargs=others, **kwargs
        )
        if commits:  # what is committed with the prompt are no drafts
            draft = generator.get_candidates

            def none_yet(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
                draft(input_ids, **kwargs)  # which counts what it has read
                del generator.get_candidates
                return input_ids, None

            generator.get_candidates = none_yet
        return generator

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, and with it all of transformers' continuous batching."""
        raise NotImplementedError(
            "continuous batching needs every state in transformers' pages, and memories have none there:"
            " use generate(), or serve the model with vLLM (docs/serving.md)"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching
