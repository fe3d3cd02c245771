"""What attention modules have that own a prefix: its parameters, another prefix for a while, and conversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtuning_fast import prefix_attention
from qtuning_fast.integrations.modules.prefixed import PrefixedAttention, check_prefix

HEADS, SIZE = 2, 4


class Plain(nn.Module):
    """An attention module of someone else's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))


class Ours(PrefixedAttention, Plain):
    def _prefix_shape(self) -> tuple[int, int]:
        return HEADS, SIZE

    def _prefix_like(self) -> Tensor:
        return self.scale


class Refusing(Ours):
    @classmethod
    def check_convertible(cls, module: nn.Module) -> None:
        raise NotImplementedError("not this one")


OPTIONS: dict[str, Any] = {"prefix_length": 3, "gate": "tanh", "gate_per": "head"}


@pytest.fixture
def converted() -> Ours:
    torch.manual_seed(0)
    return Ours.convert_(Plain(), **OPTIONS)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 2, HEADS, 5, SIZE, generator=torch.Generator().manual_seed(1)).double()
    return query, key, value


def test_a_module_is_converted_in_place_and_back() -> None:
    module = Plain()
    scale, names = module.scale, sorted(vars(module))
    ours: Any = Ours.convert_(module, **OPTIONS)
    assert ours is module and type(module) is Ours and ours.was_converted and ours.scale is scale
    assert ours.prefix_key.shape == ours.prefix_value.shape == (HEADS, 3, SIZE)
    assert ours.prefix_key.dtype == ours.prefix_gate.alpha.dtype == torch.float64
    ours.place({"prefix_key": ours.prefix_key, "prefix_value": ours.prefix_value})
    ours.revert_()
    assert (
        type(module) is Plain and sorted(vars(module)) == names and dict(module.named_parameters()) == {"scale": scale}
    )


def test_what_is_not_convertible_stays_what_it_is() -> None:
    module = Plain()
    for kind, options, error in (
        (Refusing, OPTIONS, NotImplementedError),
        (Ours, OPTIONS | {"prefix_length": -1}, ValueError),
    ):
        with pytest.raises(error):
            kind.convert_(module, **options)
        assert type(module) is Plain and [*module.state_dict()] == ["scale"]


@pytest.mark.parametrize("gate", [None, "gelu"])
def test_without_another_one_it_attends_to_its_own_prefix(inputs: Any, gate: str | None) -> None:
    module = Ours.convert_(Plain(), **OPTIONS | {"gate": gate})
    own = module.prefix_arguments()
    assert own["prefix_key"] is module.prefix_key and own["gate"] == gate
    output, weights = module.attend(*inputs, is_causal=True, scale=0.3)
    assert torch.equal(output, prefix_attention(*inputs, **own, is_causal=True, scale=0.3)) and weights is None


def test_without_any_prefix_it_is_plain_attention(inputs: Any) -> None:
    module = Ours.convert_(Plain(), **OPTIONS | {"prefix_length": 0})
    assert module.prefix_arguments() == {} and module.prefix_key is None
    output, _ = module.attend(*inputs)
    torch.testing.assert_close(output, nn.functional.scaled_dot_product_attention(*inputs))


def test_weights_are_those_over_the_context_and_give_the_same_output(converted: Ours, inputs: Any) -> None:
    output, weights = converted.attend(*inputs, need_weights=True)
    assert weights is not None and weights.shape == (2, HEADS, 5, 5) and (weights.sum(-1) < 1).all()
    torch.testing.assert_close(output, converted.attend(*inputs)[0])


def test_one_for_the_call_comes_before_a_placed_one_and_that_before_the_own(converted: Ours, inputs: Any) -> None:
    own = converted.attend(*inputs)[0]
    first, second = (
        {"prefix_key": x, "prefix_value": x, "gate": None} for x in torch.randn(2, HEADS, 1, SIZE).double()
    )
    converted.place(first)  # type: ignore[arg-type]
    placed = converted.attend(*inputs)[0]
    assert torch.equal(placed, prefix_attention(*inputs, **first)) and not torch.allclose(placed, own)
    assert torch.equal(converted.attend(*inputs, prefix=second)[0], prefix_attention(*inputs, **second))
    assert torch.equal(converted.attend(*inputs)[0], placed)
    converted.place(None)
    assert torch.equal(converted.attend(*inputs)[0], own)


@pytest.mark.parametrize(
    ("prefix", "error", "message"),
    [
        ([], TypeError, "prefix must be a mapping"),
        ({"prefix_key": 1, "attn_mask": None}, ValueError, "got 'attn_mask'"),
        ({"prefix_key": 1}, ValueError, "must hold prefix_value"),
        ({}, ValueError, "must hold prefix_key, got nothing"),
    ],
)
def test_what_is_no_prefix_is_refused(converted: Ours, prefix: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        converted.place(prefix)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prefix_length": 1.0}, TypeError, "prefix_length must be an integer, got 1.0"),
        ({"prefix_length": True}, TypeError, "prefix_length must be an integer, got True"),
        ({"prefix_length": -1}, ValueError, "prefix_length must not be negative"),
        ({"gate": "step"}, ValueError, "gate must be None or one of tanh"),
        ({"gate_per": "model"}, ValueError, "gate_per must be one of layer, head"),
    ],
)
def test_options_that_cannot_be_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_prefix(**OPTIONS | change)
    check_prefix(**OPTIONS)
