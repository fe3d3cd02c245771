"""Weights that are elsewhere: where a model takes its inputs, and what an offloaded weight holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qtuning_fast.integrations.transformers.offload import input_device, loaded


class Model(nn.Module):
    """As much of a transformers model as is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    @property
    def device(self) -> torch.device:
        return self.first.weight.device


def offload(module: nn.Module, **attributes: Any) -> dict[str, torch.Tensor]:
    """What accelerate does to a module: parameters on the meta device, and a hook that holds them."""
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    module.to("meta")
    hook = SimpleNamespace(weights_map=weights, **attributes)
    module._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), hook])  # in a sequence, as accelerate may keep it
    return weights


def test_where_nothing_is_offloaded_the_models_device_counts() -> None:
    model = Model()
    model.first._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert input_device(model) == torch.device("cpu")


def test_the_first_hook_with_a_device_says_where_inputs_go() -> None:
    model = Model()
    offload(model.first, execution_device=None)
    offload(model.second, execution_device="cuda:1")
    assert input_device(model) == torch.device("cuda:1")


def test_without_hooks_it_is_the_meta_device() -> None:
    assert input_device(Model().to("meta")) == torch.device("meta")


def test_a_weight_is_itself_or_what_its_modules_hook_holds() -> None:
    model = Model()
    weights = offload(model.second)
    for name, parameter in model.named_parameters():
        if name.startswith("first"):
            assert loaded(model, name, parameter) is parameter
        else:
            assert loaded(model, name, parameter) is weights[name.removeprefix("second.")]


def test_a_weight_that_is_nowhere_is_named() -> None:
    model = Model().to("meta")
    with pytest.raises(ValueError, match=r"Model: first\.bias is on the meta device"):
        loaded(model, "first.bias", model.first.bias)
