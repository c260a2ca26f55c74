"""The released research code, where ``FWPKM_RELEASED_CODE`` names a folder with it.

Its embedding bag runs on a GPU only; without one that is a plain sum, and everything else is as it is there.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from fwpkm.checks import require

VARIABLE = "FWPKM_RELEASED_CODE"
_PACKAGE = "fwpkm_released"
_MODULE = Path("src", "models", "fwpkm", "fwpkm.py")


def folder() -> Path | None:
    """The folder, or None where none is named.

    Raises:
        ValueError: if it does not hold the released code.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    found = (Path(name) / _MODULE).is_file()
    require(found, VARIABLE, name, "a checkout of the released code, which has {}", _MODULE)
    return Path(name)


class Released:
    """The released memory, from the inputs' keys and values on; every call continues what the one before left.

    One of its modules has one memory, whatever the batch, so each sequence has a module.
    """

    def __init__(self, inputs: Inputs, case: Case) -> None:
        require(case.key_update == "fast", "key_update", case.key_update, "'fast', what the released code does")
        self._modules = [_module(inputs, case) for _ in range(case.batch)]

    def __call__(self, inputs: Inputs, case: Case) -> Tensor:
        outputs = []
        rows = zip(self._modules, inputs.query.flatten(2), inputs.target, inputs.gate, strict=True)
        for module, *row in rows:
            module.train(torch.is_grad_enabled())
            outputs.append(module(*(x.unsqueeze(0) for x in row), case.chunk)["output"])
        return torch.cat(outputs)

    def state_bytes(self) -> int:
        """Of a sequence: the parameters of a module, which it writes to."""
        return sum(x.nbytes for x in self._modules[0].parameters())


def _module(inputs: Inputs, case: Case) -> Any:
    module = _memory()(
        mem_k_dim=case.key_dim,
        mem_v_dim=case.value_dim,
        mem_heads=case.heads,
        mem_topk=case.topk,
        mem_n_subkeys=case.n_subkeys,
    ).to(inputs.values.device)
    with torch.no_grad():  # it writes into its own parameters, so these are a copy
        module.keys.copy_(inputs.keys.flatten(0, 2))
        module.values.copy_(inputs.values)
    return module


def _memory() -> Any:
    if f"{_PACKAGE}.fwpkm" not in sys.modules:
        root = folder()
        assert root is not None
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(root / _MODULE.parent)]
        sys.modules[_PACKAGE] = package
        if torch.cuda.is_available():
            return importlib.import_module(f"{_PACKAGE}.fwpkm").FastWeightProductKeyMemory
        bag: Any = types.ModuleType(f"{_PACKAGE}.xformer_embeddingbag_grad_wrapper")
        bag.xformers_embedding_bag = _embedding_bag
        sys.modules[bag.__name__] = bag
    return importlib.import_module(f"{_PACKAGE}.fwpkm").FastWeightProductKeyMemory


def _embedding_bag(indices: Tensor, weight: Tensor, per_sample_weights: Tensor) -> Tensor:
    return (weight[indices] * per_sample_weights.unsqueeze(-1)).sum(1)
