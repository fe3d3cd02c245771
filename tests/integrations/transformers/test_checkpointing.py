"""Checkpoints take a layer's prefix as an input: what stands there later does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.integrations.transformers.checkpointing import carry_prefixes, checkpointable_layers, leave_prefixes
from qtuning_fast.integrations.transformers.lock import ComputeLock
from qtuning_fast.method.prefix import Prefix

NAMES = ["BERT", "Llama"]


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, families: Any) -> Any:
    return families[request.param].base_model()


def prefix_for(injector: PrefixInjector, seed: int) -> Prefix:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer in injector.layers:
        key, value = (torch.randn(layer.shape.num_kv_heads, 2, 8, generator=generator) for _ in range(2))
        rows.append({"prefix_key": key.requires_grad_(), "prefix_value": value.requires_grad_(), "gate": None})
    return Prefix(rows)  # type: ignore[arg-type]


def leaves(prefix: Prefix) -> list[Tensor]:
    return [layer[name] for layer in prefix.layers for name in ("prefix_key", "prefix_value")]  # type: ignore[literal-required]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_prefix_that_stood_there_before(base: Any, reentrant: bool) -> None:
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    injector = PrefixInjector(base)
    indices = range(len(injector.layers))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        injector.freeze(training=True)
        injector.switch()
        prefix = prefix_for(injector, seed=0)
        injector.place(indices, prefix)
        output = base(**inputs)[0]
        injector.place(indices, prefix_for(injector, seed=1))  # by now another one
        output.square().sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves(prefix))])
        injector.restore()
    for mine, plain in zip(found[1], found[0]):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


def test_leaving_gives_back_the_functions_and_takes_the_hooks(base: Any) -> None:
    base.gradient_checkpointing_enable()
    layers = checkpointable_layers(base)
    before = [layer._gradient_checkpointing_func for layer in layers]
    assert layers
    for _ in range(2):  # the second time nothing is wrapped again
        carry_prefixes(layers, ComputeLock(), training=True)
    assert all(layer._gradient_checkpointing_func is not old for layer, old in zip(layers, before))
    assert all(len(layer._forward_hooks) == 1 for layer in layers)
    leave_prefixes(layers)
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_a_layer_in_training_mode_drops_nothing_within_a_checkpoint_or_without_gradients(base: Any) -> None:
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    injector = PrefixInjector(base)
    injector.freeze(training=True)
    injector.switch()
    injector.place(range(len(injector.layers)), prefix_for(injector, seed=0))
    layers = checkpointable_layers(base)
    assert all(layer.training for layer in layers) and injector.checkpoints
    modes = []
    for layer, found in zip(layers, injector.layers):
        found.module.register_forward_pre_hook(lambda *_, layer=layer: modes.append(layer.training))
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    base(**inputs)
    with torch.no_grad():
        base(**inputs)
    assert modes == [False] * 2 * len(layers) and all(layer.training for layer in layers)


REENTRANT, PLAIN = {"use_reentrant": True}, {"use_reentrant": False}
SWITCHES = {
    "enabled twice": (PLAIN, PLAIN),
    "enabled twice, each kind": (REENTRANT, PLAIN),
    "enabled, disabled, enabled": (PLAIN, None, REENTRANT),
    "enabled and disabled": (REENTRANT, None),
    "disabled first": (None, PLAIN),
}


def gradients(base: Any, injector: PrefixInjector) -> list[Tensor]:
    prefix = prefix_for(injector, seed=0)
    injector.freeze(training=True)
    injector.switch()
    injector.place(range(len(injector.layers)), prefix)
    base(input_ids=torch.arange(5, 12)[None])[0].square().sum().backward()
    injector.restore()
    return [leaf.grad for leaf in leaves(prefix) if leaf.grad is not None]


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_in_whichever_order_it_is_enabled_and_disabled_the_gradients_are_those_of_none(
    base: Any, switches: tuple[Any, ...]
) -> None:
    injector = PrefixInjector(base)
    expected = gradients(base, injector)
    assert len(expected) == 2 * len(injector.layers)
    for kind in switches:
        if kind is None:
            base.gradient_checkpointing_disable()
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        found = gradients(base, injector)
        assert len(found) == len(expected) and injector.checkpoints == (kind is not None)
        for mine, plain in zip(found, expected):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    injector.detach()
    for layer in checkpointable_layers(base):
        assert not layer._forward_hooks and not layer._forward_pre_hooks
        assert layer.gradient_checkpointing == (switches[-1] is not None)
        assert "qtuning" not in type(getattr(layer, "_gradient_checkpointing_func", None)).__module__


@pytest.mark.parametrize("kind", [REENTRANT, PLAIN], ids=["reentrant", "non-reentrant"])
def test_the_backward_pass_may_come_after_detach(base: Any, kind: dict[str, bool]) -> None:
    found = []
    for checkpointing in (False, True):
        injector = PrefixInjector(base)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        injector.freeze(training=True)
        injector.switch()
        prefix = prefix_for(injector, seed=0)
        injector.place(range(len(injector.layers)), prefix)
        loss = base(input_ids=torch.arange(5, 12)[None])[0].square().sum()
        injector.detach()
        base.requires_grad_(False)
        loss.backward()
        found.append([leaf.grad for leaf in leaves(prefix)])
    for plain, mine in zip(*found):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
