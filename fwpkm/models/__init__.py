"""The hybrid language model and its configuration, in transformers' form."""

from transformers import AutoConfig, AutoModelForCausalLM

from fwpkm.models.cache import FwPKMCache
from fwpkm.models.configuration import FwPKMConfig
from fwpkm.models.modeling import FwPKMForCausalLM, FwPKMOutput

AutoConfig.register(FwPKMConfig.model_type, FwPKMConfig, exist_ok=True)
AutoModelForCausalLM.register(FwPKMConfig, FwPKMForCausalLM, exist_ok=True)

__all__ = ["FwPKMCache", "FwPKMConfig", "FwPKMForCausalLM", "FwPKMOutput"]
