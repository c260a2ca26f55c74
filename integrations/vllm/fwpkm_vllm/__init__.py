"""Serving ``FwPKMForCausalLM`` with vLLM: the fast weights of a request are records in vLLM's own KV cache.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins``; nothing of this package is imported by hand.
"""

# The releases of vLLM that the tests ran with, and one whose sources have all that is used; its plugin
# interfaces change with every minor release.
TESTED = ("0.32", "0.33")


def register() -> None:
    """Make the model known to vLLM; called in each of its processes, possibly more than once.

    With another vLLM than the tested ones a line in the log says so, and other models are served as ever.
    """
    import vllm

    if not is_tested(vllm.__version__):
        from vllm.logger import init_logger

        message = "FwPKMForCausalLM cannot be served: fwpkm_vllm was made for vLLM %s, this is %s"
        init_logger("vllm.fwpkm").warning(message, " and ".join(TESTED), vllm.__version__)
        return

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import fwpkm.models  # transformers' Auto classes know the configuration from here on
    from fwpkm_vllm import operator, sharing
    from fwpkm_vllm.options import Options

    architecture = fwpkm.models.FwPKMForCausalLM.__name__
    if architecture not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture, f"fwpkm_vllm.model:{architecture}")
    MODELS_CONFIG_MAP[architecture] = Options
    sharing.register()
    operator.split_graphs()


def is_tested(version: str) -> bool:
    """Whether ``version`` of vLLM is one that this was made for."""
    return ".".join(version.split("+")[0].split(".")[:2]) in TESTED
