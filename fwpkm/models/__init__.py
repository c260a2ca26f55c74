"""The hybrid language model and its configuration, in transformers' form."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fwpkm.models.cache import FwPKMCache
from fwpkm.models.configuration import FwPKMConfig
from fwpkm.models.modeling import (
    FwPKMForCausalLM,
    FwPKMForQuestionAnswering,
    FwPKMForSequenceClassification,
    FwPKMForTokenClassification,
    FwPKMModel,
    FwPKMModelOutput,
    FwPKMOutput,
)

AutoConfig.register(FwPKMConfig.model_type, FwPKMConfig, exist_ok=True)
for auto, model in (
    (AutoModel, FwPKMModel),
    (AutoModelForCausalLM, FwPKMForCausalLM),
    (AutoModelForQuestionAnswering, FwPKMForQuestionAnswering),
    (AutoModelForSequenceClassification, FwPKMForSequenceClassification),
    (AutoModelForTokenClassification, FwPKMForTokenClassification),
):
    auto.register(FwPKMConfig, model, exist_ok=True)

__all__ = [
    "FwPKMCache",
    "FwPKMConfig",
    "FwPKMForCausalLM",
    "FwPKMForQuestionAnswering",
    "FwPKMForSequenceClassification",
    "FwPKMForTokenClassification",
    "FwPKMModel",
    "FwPKMModelOutput",
    "FwPKMOutput",
]
