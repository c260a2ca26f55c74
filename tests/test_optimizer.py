"""Parameter groups: everything once, memories by themselves, no decay where it does harm."""

import pytest
import torch

from fwpkm.training.optimizer import parameter_groups
from tests.test_models import make_model


@pytest.mark.parametrize("learned", [False, True])
def test_every_parameter_is_in_its_group(learned):
    key_update = "slow" if learned else "fast"
    layout = {"layer_types": ["linear_attention", "full_attention"], "fwpkm_layers": [0], "pkm_layers": [1]}
    model = make_model(fwpkm_learn_initial_values=learned, fwpkm_key_update=key_update, **layout)
    model.lm_head.weight.requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.1, 1e-2)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.0)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain, rows = ({names[p] for p in group["params"]} for group in groups)
    memory = {"model.layers.0.memory.keys", "model.layers.0.memory.values"}
    assert rows == {"model.layers.1.mlp.values"} | (memory if learned else set())
    assert plain == {name for p, name in names.items() if name.endswith(("norm.weight", "bias", "A_log"))}
    assert decayed == set(names.values()) - rows - plain - {"lm_head.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names) - 1


def test_steps_and_schedules_by_group():
    """An optimizer takes the groups, empty ones too; the values keep their rate and do not decay."""
    model = make_model(fwpkm_layers=[], pkm_layers=[0])
    groups = parameter_groups(model, 0.5, 0.5, 0.25)
    values, before = model.model.layers[0].mlp.values, model.model.layers[0].mlp.values.clone()
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.1, lambda step: 0.1, lambda step: 1.0])
    tokens = torch.randint(32, (2, 6))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.25]
    assert torch.allclose(values, before - 0.25 * values.grad)
    assert (values == before).all(-1).any()  # rows that no token addressed
    memoryless = make_model(fwpkm_layers=[])
    assert parameter_groups(memoryless, 0.1, 0.1, 0.1)[2]["params"] == []
    torch.optim.AdamW(parameter_groups(memoryless, 0.1, 0.1, 0.1), foreach=True)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "memory_learning_rate"])
def test_bad_rates(name):
    rates = {"learning_rate": 0.1, "weight_decay": 0.1, "memory_learning_rate": 0.1, name: -1.0}
    with pytest.raises(ValueError, match=f"{name} is -1.0; expected a number >= 0"):
        parameter_groups(make_model(), **rates)
