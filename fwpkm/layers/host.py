"""What the releases of transformers that this model runs with call by different names."""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

from fwpkm.checks import require

# What a model's cache is called, as an argument and in outputs: transformers 5.24 gave it another name.
CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, by whichever of its names it came; None without one.

    Raises:
        ValueError: if it came by both.
    """
    both = cache is not None and past_key_values is not None
    require(not both, "past_key_values", "given beside cache", "one of them: they are two names of the same argument")
    return past_key_values if cache is None else cache
