"""Training in several processes: whole models that average their gradients, or one whose parameters are spread."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fwpkm.checks import require
from fwpkm.models import FwPKMForCausalLM

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def start() -> Accelerator:
    """Join the processes that ``torchrun`` or ``accelerate launch`` has started, if they have."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    kind = accelerator.distributed_type
    require(kind in _PLAIN, "accelerate's distributed type", kind.value, "plain processes; fsdp is an option here")
    return accelerator


def spread(model: FwPKMForCausalLM, accelerator: Accelerator, fsdp: bool) -> nn.Module:
    """The model as it is trained, on the device of this process.

    Args:
        model: the same in every process.
        accelerator: from :func:`start`.
        fsdp: spread the parameters over the processes (FSDP2), a block at a time and the rest; fast-weight buffers
            stay whole everywhere. Otherwise every process has the whole model (DDP), or is the only one.
    """
    if not fsdp:
        return accelerator.prepare_model(model)
    require(accelerator.num_processes > 1, "fsdp", fsdp, "several processes, from torchrun or accelerate launch")
    # Nothing is changed in place of what a block returns: gates and slots are read only.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_model(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The model's tensors on the CPU, each once and whole. All processes call this; some only help, and keep none."""
    return _whole(model.state_dict(keep_vars=True).items(), keep)


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Tensor]:
    """The optimizer's tensors as ``<parameter>.<name>``, like :func:`whole_model`."""
    states = ((name, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state)
    return _whole(((f"{name}.{key}", t) for name, state in states for key, t in state.items()), keep)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the tensors that :func:`whole_optimizer` has gathered, from any number of processes."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        of_parameter.setdefault(name, {})[key] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        i: {key: _like(parameter, tensor) for key, tensor in of_parameter[names[parameter]].items()}
        for i, parameter in enumerate(parameters)
        if names[parameter] in of_parameter
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _whole(named: Iterable[tuple[str, Any]], keep: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named:
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        gathered = whole(tensor.detach())
        if keep:
            tensors[name] = gathered.cpu().contiguous()
    return tensors


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, gathered in all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Spread as the parameter is; a counter of steps is not."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        whole = tensor.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
